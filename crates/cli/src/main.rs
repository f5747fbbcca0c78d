//! The `marlin` command line: one file per command in `commands`.

/// `println!` that returns a closed standard output as an error instead of panicking.
macro_rules! print_line {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), $($argument)*)?
    }};
}

mod args;
mod bundled;
mod calibration;
mod commands;
mod device;
mod session;
mod usage;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Run, quantize and measure mixture-of-experts language models at 2 to 8 bits.
#[derive(Parser)]
#[command(name = "marlin", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a text
    Generate(commands::generate::GenerateArgs),
    /// Talk with a model
    Chat(commands::chat::ChatArgs),
    /// Write a quantized copy of a model
    Quantize(commands::quantize::QuantizeArgs),
    /// Write any checkpoint that is read, other projects' included, in our layout
    Convert(commands::convert::ConvertArgs),
    /// Show a model's architecture, tensors, formats, bits per weight and memory
    Inspect(commands::inspect::InspectArgs),
    /// Measure the perplexity of a text
    Perplexity(commands::perplexity::PerplexityArgs),
    /// Write the logits of given tokens to a safetensors file
    Logits(commands::logits::LogitsArgs),
    /// Write random weights in a real architecture, for benchmarks
    Synth(commands::synth::SynthArgs),
    /// Time prefill and decode
    Bench(commands::bench::BenchArgs),
    /// Compare every operation of a device with the f64 oracle
    Verify(commands::verify::VerifyArgs),
    /// List the kernels of the original collection and what stands for them
    Kernels(commands::kernels::KernelsArgs),
    /// List the devices of this machine
    Devices(commands::devices::DevicesArgs),
}

/// Without a session, Mesa's device-selection layer complains on standard error that it finds no display server; it is
/// not needed, because devices are chosen here.
#[cfg(all(feature = "gpu", target_os = "linux"))]
fn silence_device_selection() {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: called first in `main`: no other thread exists that could read the environment.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}

fn main() -> ExitCode {
    #[cfg(all(feature = "gpu", target_os = "linux"))]
    silence_device_selection();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Generate(args) => commands::generate::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Quantize(args) => commands::quantize::run(args),
        Command::Convert(args) => commands::convert::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Perplexity(args) => commands::perplexity::run(args),
        Command::Logits(args) => commands::logits::run(args),
        Command::Synth(args) => commands::synth::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Verify(args) => commands::verify::run(args),
        Command::Kernels(args) => commands::kernels::run(args),
        Command::Devices(args) => commands::devices::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("marlin: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes in one line. The libraries' messages hold those of their sources, which are not repeated.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// `marlin ... | head` closes our stdout; that is the reader's choice, not a failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_and_say_nothing_twice() {
        let source = std::io::Error::other("no\n  space");
        let error = marlin_models::ModelError::io(std::path::Path::new("file"))(source);
        assert_eq!(one_line(&anyhow::Error::new(error)), "file: no space");
        let error = anyhow::Error::new(std::io::Error::other("cause")).context("file");
        assert_eq!(one_line(&error), "file: cause");
    }
}
