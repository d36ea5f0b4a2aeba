//! The rack lab.
