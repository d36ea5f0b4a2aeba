//! One module a role of the program.
