//! Normal-float level tables: NF4 (QLoRA) and the symmetric NF3 and NF2.

/// The 16 NF4 levels, ascending. Level 7 is exactly 0.
pub const NF4: [f32; 16] = from_bits([
    0xBF80_0000,
    0xBF32_39B1,
    0xBF06_6B30,
    0xBECA_32A0,
    0xBE91_A24D,
    0xBE3D_353F,
    0xBDBA_7871,
    0x0000_0000,
    0x3DA2_FAFF,
    0x3E24_CAE3,
    0x3E7C_04DD,
    0x3EAD_033A,
    0x3EE1_A4B8,
    0x3F10_07AB,
    0x3F39_13B3,
    0x3F80_0000,
]);

/// The 8 NF3 levels, ascending: normal quantiles at the centres of eight equally likely bins.
pub const NF3: [f32; 8] =
    from_bits([0xBF80_0000, 0xBF14_09F5, 0xBEA3_2005, 0xBDD2_012A, 0x3DD2_012A, 0x3EA3_2005, 0x3F14_09F5, 0x3F80_0000]);

/// The 4 NF2 levels, ascending: normal quantiles at the centres of four equally likely bins.
pub const NF2: [f32; 4] = from_bits([0xBF80_0000, 0xBE8D_D219, 0x3E8D_D219, 0x3F80_0000]);

const fn from_bits<const LEVELS: usize>(bits: [u32; LEVELS]) -> [f32; LEVELS] {
    let mut levels = [0.0; LEVELS];
    let mut i = 0;
    while i < LEVELS {
        levels[i] = f32::from_bits(bits[i]);
        i += 1;
    }
    levels
}

/// The index of the level nearest to `t`, decided by the f32 midpoints of adjacent levels; a
/// midpoint itself goes to the lower code.
///
/// `levels` ascends and has at most 256 entries. NaN has no code and gives 0.
#[inline]
pub fn encode(levels: &[f32], t: f32) -> u8 {
    levels.windows(2).map(|pair| u8::from(t > (pair[0] + pair[1]) * 0.5)).sum()
}
