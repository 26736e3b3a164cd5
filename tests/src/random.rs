//! Seeded randomness for tests: small, the same everywhere, and told when a test fails.

/// A sequence of numbers that follows from its seed (SplitMix64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Takes the seed from `CRCOORD_TEST_SEED`, else from the clock, and prints it.
    ///
    /// # Panics
    /// The variable is no number.
    pub fn announced(test: &str) -> Random {
        let seed = match std::env::var("CRCOORD_TEST_SEED") {
            Ok(text) => text.parse().expect("CRCOORD_TEST_SEED is a number"),
            Err(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |since| since.as_nanos() as u64),
        };
        println!("{test}: CRCOORD_TEST_SEED={seed}");
        Random(seed)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// Sleeps for up to `milliseconds`: the moment of a checkpoint is to be arbitrary.
    pub fn sleep_below(&mut self, milliseconds: u64) {
        let microseconds = self.below(milliseconds * 1000);
        std::thread::sleep(std::time::Duration::from_micros(microseconds));
    }
}
