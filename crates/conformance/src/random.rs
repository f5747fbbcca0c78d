use marlin_ops::rng::{philox4x32, uniform};

/// A reproducible sequence for the inputs of one case.
pub(crate) struct Random {
    key: [u32; 2],
    next: u32,
}

impl Random {
    /// The sequence that belongs to a text, for instance a case's configuration (FNV-1a hash).
    pub(crate) fn of(text: &str) -> Self {
        let hash = text
            .bytes()
            .fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
        Self { key: [hash as u32, (hash >> 32) as u32], next: 0 }
    }

    fn words(&mut self) -> [u32; 4] {
        self.next += 1;
        philox4x32(self.key, [self.next, 0, 0, 0])
    }

    /// A random word.
    pub(crate) fn word(&mut self) -> u32 {
        self.words()[0]
    }

    /// Uniform in `0..below`.
    pub(crate) fn below(&mut self, below: usize) -> usize {
        (uniform(self.word()) * below as f64) as usize
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        // 24 bits, so that rounding to f32 stays below 1.
        (self.word() >> 8) as f32 / 16_777_216.0
    }

    /// Close to normal with mean 0 and variance 1: the sum of four uniform values.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f64 = self.words().into_iter().map(uniform).sum();
        ((sum - 2.0) * 3f64.sqrt()) as f32
    }

    /// Many [`Random::normal`] values.
    pub(crate) fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }

    /// `count` different values of `0..below`, in random order.
    pub(crate) fn distinct(&mut self, count: usize, below: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..below as u32).collect();
        for i in 0..count {
            let j = i + self.below(below - i);
            all.swap(i, j);
        }
        all.truncate(count);
        all
    }
}
