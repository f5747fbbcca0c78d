//! marlin-models
