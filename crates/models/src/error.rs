use std::io;
use std::path::{Path, PathBuf};

use marlin_ops::OpError;

/// The result of everything that reads, writes or runs a model.
pub type Result<T> = std::result::Result<T, ModelError>;

/// What is wrong with a model folder, or with what was asked of a model. Every variant names the file and the tensor
/// or field.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file that must exist does not.
    #[error("{}: not found; {needed_for}", path.display())]
    MissingFile {
        /// The file looked for.
        path: PathBuf,
        /// Why it is needed.
        needed_for: &'static str,
    },
    /// A JSON file that is not valid JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// `model_type` is none of the supported architectures.
    #[error("{}: model_type `{model_type}` is not supported; supported: {known}", path.display())]
    UnknownArchitecture {
        /// The config file.
        path: PathBuf,
        /// The value found.
        model_type: String,
        /// Supported values, comma separated.
        known: String,
    },
    /// A field of a JSON file is missing or has an impossible value.
    #[error("{}: field `{field}` {reason}", path.display())]
    Config {
        /// The JSON file.
        path: PathBuf,
        /// The field, with its parents: `rope_scaling.factor`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor the architecture needs is in no file.
    #[error("{}: tensor `{tensor}` is missing", path.display())]
    MissingTensor {
        /// The folder, or the shard that the index names.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor the architecture does not know.
    #[error("{}: tensor `{tensor}` is not part of this architecture ({count} such tensors)", path.display())]
    ExtraTensor {
        /// The file that holds it.
        path: PathBuf,
        /// The first such tensor by name.
        tensor: String,
        /// How many there are.
        count: usize,
    },
    /// A tensor that two files hold.
    #[error("{}: tensor `{tensor}` is also in {}", path.display(), other.display())]
    DuplicateTensor {
        /// The second file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The first file.
        other: PathBuf,
    },
    /// A tensor of the wrong shape.
    #[error("{}: tensor `{tensor}` has shape {found:?}, expected {expected:?}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the config asks for.
        expected: Vec<usize>,
    },
    /// A tensor of a form that this project does not read.
    #[error("{}: tensor `{tensor}`: {what} is not supported", path.display())]
    UnsupportedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it stands for.
        what: &'static str,
    },
    /// A tensor of a type that does not fit its use.
    #[error("{}: tensor `{tensor}` has dtype {found}, expected {expected}", path.display())]
    TensorDType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The dtype's name in the file.
        found: String,
        /// Accepted dtypes.
        expected: &'static str,
    },
    /// A safetensors header that contradicts itself or the file.
    #[error("{}: bad safetensors header: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the tensor's name where there is one.
        reason: String,
    },
    /// A GGUF file that contradicts itself, or holds what this project does not read.
    #[error("{}: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the tensor or key.
        reason: String,
    },
    /// A file shorter than its header says.
    #[error("{}: file is truncated: {found} bytes, expected {expected}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the header asks for.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// A NaN or infinite weight.
    #[error("{}: tensor `{tensor}` holds {value} at element {index}; weights must be finite", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row-major element index.
        index: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// A tensor that the operations layer refuses: a native one with invalid scales or zeros, a rank above 4.
    #[error("{}: tensor `{tensor}`: {source}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor, or the module for what its tensors say together.
        tensor: String,
        /// What is wrong.
        source: Box<OpError>,
    },
    /// A tensor that a rotation of the model's bases would have to change, without a rule for it.
    #[error("{}: tensor `{tensor}`: no rotation is known for it in a `{architecture}` model", path.display())]
    Unrotatable {
        /// The config file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The `model_type`.
        architecture: &'static str,
    },
    /// A tensor of another project's format whose shape or content contradicts its companions.
    #[error("{}: tensor `{tensor}` {reason}", path.display())]
    TensorContent {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tokenizer file that cannot be loaded, or text or ids that it refuses.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// The library's message.
        reason: String,
    },
    /// A chat template that does not parse, fails, or refuses the messages.
    #[error("{}: chat template: {reason}", path.display())]
    ChatTemplate {
        /// The file that holds the template.
        path: PathBuf,
        /// The engine's message, with the line.
        reason: String,
    },
    /// The output folder exists.
    #[error("{}: output folder exists already; choose another or remove it", path.display())]
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// A request that the model cannot serve: an empty prompt, one longer than the context, an unknown name.
    #[error("{what} {reason}")]
    Request {
        /// The argument.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// An operation failed while the model ran.
    #[error(transparent)]
    Op(#[from] OpError),
}

impl ModelError {
    /// An I/O error with its path.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> ModelError + '_ {
        move |source| ModelError::Io { path: path.to_owned(), source }
    }

    /// An error of the operations layer about a stored tensor.
    pub(crate) fn tensor(path: &Path, tensor: &str) -> impl Fn(OpError) -> ModelError {
        move |source| ModelError::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), source: Box::new(source) }
    }

    /// A stored tensor of a form that is not read.
    pub(crate) fn unsupported_tensor(path: &Path, tensor: String, what: &'static str) -> Self {
        ModelError::UnsupportedTensor { path: path.to_owned(), tensor, what }
    }

    /// A field error.
    pub fn config(path: &Path, field: impl Into<String>, reason: impl Into<String>) -> Self {
        ModelError::Config { path: path.to_owned(), field: field.into(), reason: reason.into() }
    }

    /// A request error.
    pub fn request(what: &'static str, reason: impl Into<String>) -> Self {
        ModelError::Request { what, reason: reason.into() }
    }
}
