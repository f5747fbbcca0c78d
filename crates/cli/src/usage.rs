//! Memory use of this process.

/// Largest resident set so far in bytes, or none where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    #[cfg(unix)]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        let peak = u64::try_from(getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss()).ok()?;
        // Linux reports KiB, macOS bytes.
        Some(if cfg!(target_os = "macos") { peak } else { peak * 1024 })
    }
    #[cfg(not(unix))]
    None
}
