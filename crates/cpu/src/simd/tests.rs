//! Every operation of every instruction set against plain arithmetic.

use half::{bf16, f16};

use super::{Kernel, LANES, Level, Simd};

/// A pseudorandom sequence of words: a linear congruential generator.
struct Words(u64);

impl Words {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn lanes<T>(&mut self, f: impl Fn(u32) -> T) -> [T; LANES] {
        std::array::from_fn(|_| f(self.next()))
    }
}

/// Values with signs, zeros, infinities, NaN and subnormals among them.
fn value(word: u32) -> f32 {
    const SPECIAL: [f32; 8] = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-42, -1e-42, 1.0];
    match word % 4 {
        0 => SPECIAL[(word >> 8) as usize % SPECIAL.len()],
        _ => (word as i32) as f32 / 1e6,
    }
}

/// Bits, with one NaN standing for all.
fn bits(v: [f32; LANES]) -> [u32; LANES] {
    v.map(|v| if v.is_nan() { f32::NAN } else { v }.to_bits())
}

/// Runs a body generic over the instruction set on each set of this machine.
macro_rules! on_every_level {
    (|$s:ident, $level:ident $(, $name:ident: $ty:ty)*| $body:block) => {{
        struct Body($($ty,)* Level);
        impl Kernel for Body {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, $s: S) {
                let Self($($name,)* $level) = self;
                $body
            }
        }
        for level in Level::all() {
            level.run(Body($($name.clone(),)* level));
        }
    }};
}

/// The lanes of a vector of floats, as bits.
macro_rules! floats {
    ($s:ident, $v:expr) => {{
        let mut out = [0.0; LANES];
        $s.store($v, &mut out);
        bits(out)
    }};
}

/// The lanes of a vector of integers.
macro_rules! integers {
    ($s:ident, $v:expr) => {{
        let mut out = [0; LANES];
        $s.store_i($v, &mut out);
        out
    }};
}

#[test]
fn arithmetic() {
    let mut words = Words(1);
    for _ in 0..500 {
        let (a, b, c) = (words.lanes(value), words.lanes(value), words.lanes(value));
        on_every_level!(|s, level, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]| {
            let zip = |f: fn(f32, f32) -> f32| bits(std::array::from_fn(|i| f(a[i], b[i])));
            let (x, y, z) = (s.load(&a), s.load(&b), s.load(&c));
            assert_eq!(floats!(s, s.add(x, y)), zip(|a, b| a + b), "{level:?} add {a:?} {b:?}");
            assert_eq!(floats!(s, s.sub(x, y)), zip(|a, b| a - b), "{level:?} sub {a:?} {b:?}");
            assert_eq!(floats!(s, s.mul(x, y)), zip(|a, b| a * b), "{level:?} mul {a:?} {b:?}");
            assert_eq!(floats!(s, s.div(x, y)), zip(|a, b| a / b), "{level:?} div {a:?} {b:?}");
            assert_eq!(floats!(s, s.max(x, y)), zip(|a, b| if a > b { a } else { b }), "{level:?} max {a:?} {b:?}");
            assert_eq!(floats!(s, s.min(x, y)), zip(|a, b| if a < b { a } else { b }), "{level:?} min {a:?} {b:?}");
            let fused = bits(std::array::from_fn(|i| match level {
                Level::Portable(_) => a[i] * b[i] + c[i],
                _ => a[i].mul_add(b[i], c[i]),
            }));
            assert_eq!(floats!(s, s.fma(x, y, z)), fused, "{level:?} fma {a:?} {b:?} {c:?}");
            assert_eq!(floats!(s, s.splat(a[0])), bits([a[0]; LANES]), "{level:?} splat");
        });
    }
}

#[test]
fn reductions() {
    let mut words = Words(2);
    for _ in 0..500 {
        // Small integers: their sum is exact in any order.
        let v = words.lanes(|word| ((word >> 8) % 4001) as f32 - 2000.0);
        on_every_level!(|s, level, v: [f32; LANES]| {
            assert_eq!(s.reduce_add(s.load(&v)), v.iter().sum::<f32>(), "{level:?} {v:?}");
            assert_eq!(s.reduce_max(s.load(&v)), v.into_iter().fold(f32::MIN, f32::max), "{level:?} {v:?}");
        });
    }
}

#[test]
fn transposition() {
    on_every_level!(|s, level| {
        let row = |i| std::array::from_fn(|j| (LANES * i + j) as f32);
        let transposed = s.transpose(std::array::from_fn(|i| s.load(&row(i))));
        for (j, column) in transposed.into_iter().enumerate() {
            let expected = std::array::from_fn(|i| (LANES * i + j) as f32);
            assert_eq!(floats!(s, column), bits(expected), "{level:?} column {j}");
        }
    });
}

#[test]
fn reductions_take_infinities() {
    on_every_level!(|s, level| {
        assert_eq!(s.reduce_max(s.splat(f32::NEG_INFINITY)), f32::NEG_INFINITY, "{level:?}");
        assert_eq!(s.reduce_add(s.splat(f32::INFINITY)), f32::INFINITY, "{level:?}");
    });
}

#[test]
fn integers() {
    let mut words = Words(3);
    for n in (0..32).cycle().take(500) {
        let (a, b) = (words.lanes(|word| word), words.lanes(|word| word));
        on_every_level!(|s, level, a: [u32; LANES], b: [u32; LANES], n: u32| {
            let zip = |f: fn(u32, u32) -> u32| -> [u32; LANES] { std::array::from_fn(|i| f(a[i], b[i])) };
            let (x, y) = (s.load_i(&a), s.load_i(&b));
            assert_eq!(integers!(s, s.and(x, y)), zip(|a, b| a & b), "{level:?} and");
            assert_eq!(integers!(s, s.or(x, y)), zip(|a, b| a | b), "{level:?} or");
            assert_eq!(integers!(s, s.xor(x, y)), zip(|a, b| a ^ b), "{level:?} xor");
            assert_eq!(integers!(s, s.add_i(x, y)), zip(u32::wrapping_add), "{level:?} add_i");
            assert_eq!(integers!(s, s.shr(x, n)), a.map(|a| a >> n), "{level:?} shr {n}");
            assert_eq!(integers!(s, s.sar(x, n)), a.map(|a| (a as i32 >> n) as u32), "{level:?} sar {n}");
            assert_eq!(integers!(s, s.shl(x, n)), a.map(|a| a << n), "{level:?} shl {n}");
            assert_eq!(integers!(s, s.splat_i(a[0] as i32)), [a[0]; LANES], "{level:?} splat_i");
            assert_eq!(floats!(s, s.bits_to_f32(x)), bits(a.map(f32::from_bits)), "{level:?} bits_to_f32");
            assert_eq!(floats!(s, s.to_f32(x)), bits(a.map(|a| a as i32 as f32)), "{level:?} to_f32");
            let bytes = a.map(|a| a as u8);
            assert_eq!(s.low_bytes(x), bytes, "{level:?} low_bytes");
            assert_eq!(integers!(s, s.load_u8(&bytes)), bytes.map(u32::from), "{level:?} load_u8");
        });
    }
}

#[test]
fn rounding_is_to_nearest_even() {
    let mut words = Words(4);
    for _ in 0..500 {
        // Multiples of 1/4: every fourth is a tie.
        let v = words.lanes(|word| (word as i32 >> 10) as f32 / 4.0);
        on_every_level!(|s, level, v: [f32; LANES]| {
            let expected = v.map(|v| v.round_ties_even() as i32 as u32);
            assert_eq!(integers!(s, s.round_i(s.load(&v))), expected, "{level:?} {v:?}");
        });
    }
}

#[test]
fn every_half_widens_exactly() {
    on_every_level!(|s, level| {
        for start in (0..=u16::MAX).step_by(LANES) {
            let v: [u16; LANES] = std::array::from_fn(|i| start + i as u16);
            let expected = bits(v.map(|v| f16::from_bits(v).to_f32()));
            assert_eq!(floats!(s, s.load_f16(&v)), expected, "{level:?} f16 {start:#x}");
            let expected = bits(v.map(|v| bf16::from_bits(v).to_f32()));
            assert_eq!(floats!(s, s.load_bf16(&v)), expected, "{level:?} bf16 {start:#x}");
        }
    });
}

#[test]
fn tables() {
    let mut words = Words(5);
    for _ in 0..200 {
        let index = words.lanes(|word| word);
        let sixteen = words.lanes(value);
        let bytes = words.lanes(|word| word as u8);
        let table: [f32; 256] = std::array::from_fn(|_| value(words.next()));
        on_every_level!(|s,
                         level,
                         index: [u32; LANES],
                         sixteen: [f32; LANES],
                         bytes: [u8; LANES],
                         table: [f32; 256]| {
            let found = floats!(s, s.lut16(&sixteen, s.load_i(&index)));
            assert_eq!(found, bits(index.map(|i| sixteen[i as usize & 15])), "{level:?} lut16 {index:?}");
            let index = index.map(|i| i >> 24);
            let found = floats!(s, s.lut256(&table, s.load_i(&index)));
            assert_eq!(found, bits(index.map(|i| table[i as usize])), "{level:?} lut256 {index:?}");
            let index = index.map(|i| i.wrapping_mul(0x0107_2B35) & 0x0F0F_0F0F);
            let found = integers!(s, s.lut16_bytes(&bytes, s.load_i(&index)));
            let expected = index.map(|i| u32::from_le_bytes(i.to_le_bytes().map(|i| bytes[usize::from(i)])));
            assert_eq!(found, expected, "{level:?} lut16_bytes {index:?}");
        });
    }
}

/// `acc + sum of u8 x i8`, in exact arithmetic.
fn dot(acc: u32, u: u32, x: u32) -> u32 {
    let products = u.to_le_bytes().into_iter().zip(x.to_le_bytes()).map(|(u, x)| i32::from(u) * i32::from(x as i8));
    acc.wrapping_add(products.sum::<i32>() as u32)
}

#[test]
fn dot_products() {
    let mut words = Words(6);
    let mut vectors: Vec<_> = (0..500).map(|_| (words.lanes(|w| w), words.lanes(|w| w), words.next())).collect();
    for x in [0x7F7F_7F7F, 0x8080_8080, 0x8181_8181, 0x7F80_817F] {
        vectors.push(([0; LANES], [u32::MAX; LANES], x));
        vectors.push(([0x1234_5678; LANES], [0x8080_8080; LANES], x));
    }
    for (acc, u, x) in vectors {
        on_every_level!(|s, level, acc: [u32; LANES], u: [u32; LANES], x: u32| {
            let sum = |u: [u32; LANES]| -> [u32; LANES] { std::array::from_fn(|i| dot(acc[i], u[i], x)) };
            let found = s.dot4_wide(s.load_i(&acc), s.load_i(&u), x as i32);
            assert_eq!(integers!(s, found), sum(u), "{level:?} dot4_wide {u:x?} {x:x}");
            let u = u.map(|u| u & 0x7F7F_7F7F);
            let found = s.dot4(s.load_i(&acc), s.load_i(&u), x as i32);
            assert_eq!(integers!(s, found), sum(u), "{level:?} dot4 {u:x?} {x:x}");
        });
    }
}
