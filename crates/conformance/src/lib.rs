//! marlin-conformance
