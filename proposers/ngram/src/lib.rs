//! Prompt lookup: drafts by matching the end of the text earlier in it
