//! marlin-quantize
