//! The program as a user meets it: exit codes, JSON, and messages.

mod bench;
mod check;
mod fetch;
mod generate;
mod lists;
mod replay;
mod run;
mod select;
mod usage;
