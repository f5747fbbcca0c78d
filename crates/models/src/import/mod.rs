//! Weights of other projects' checkpoints, one file a method.

mod exl3;
