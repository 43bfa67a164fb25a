use std::collections::BTreeSet;

use crate::ReplayError;

/// The text of a shader that multiplies cooperative matrices, for devices that have halves but no such matrices: threads
/// of a workgroup play the subgroups of 32. For tests, of all that does not depend on how matrices round.
///
/// It is the same text but for the words of matrices and subgroups, which become calls of functions:
/// * matrices are 16 × 16 halves, and sums of f32. They lie in arrays of vectors of four: left ones and sums by rows,
///   right ones by rows or columns, all of them in one array;
/// * shuffles are `subgroupShuffleXor` of an f32, called by all threads alike;
/// * the entry point takes and numbers threads as that of `splitkv` does, and has constants `WIDTH` and `THREADS`.
///
/// The workgroup takes 4 bytes of memory more for each thread.
///
/// # Errors
/// [`ReplayError::Emulation`] with the first words that are spelled otherwise, so that nothing else is tested unnoticed.
pub fn emulated_matrices(shader: &str) -> Result<String, ReplayError> {
    let mut text = String::new();
    for line in shader.lines() {
        text += line.split("//").next().unwrap_or(line);
        text += "\n";
    }
    for (spelled, emulated) in ONCE {
        if text.matches(spelled).count() != 1 {
            return Err(ReplayError::Emulation(format!("a shader without one `{}`", spelled.trim_end())));
        }
        text = text.replace(spelled, emulated);
    }
    let mut out = String::new();
    let mut functions = BTreeSet::new();
    let mut rest = text.as_str();
    while let Some(at) = next(rest) {
        out += &rest[..at];
        let (word, behind) = rest[at..].split_at(word(&rest[at..]));
        let line = || rest[at..].lines().next().unwrap_or_default();
        let (call, behind) = emulated(word, behind, &out, &mut functions)
            .ok_or_else(|| ReplayError::Emulation(format!("`{}`", line())))?;
        out += &call;
        rest = behind;
    }
    out += rest;
    let common = every().filter(|function| !function.contains(BUFFER)).map(str::to_owned);
    out.extend(common.chain(functions).map(|function| function + "\n"));
    Ok(out)
}

/// What a shader says once, and what is said in its place. The width is only looked at.
const ONCE: [(&str, &str); 5] = [
    ("enable wgpu_cooperative_matrix;\n", ""),
    ("const WIDTH: u32 = 32u;", "const WIDTH: u32 = 32u;"),
    ("@builtin(subgroup_id) subgroup: u32,", "@builtin(local_invocation_index) thread: u32,"),
    ("@builtin(subgroup_invocation_id) invocation: u32,", ""),
    (
        "let thread = subgroup * WIDTH + invocation;",
        "let subgroup = thread / WIDTH; let invocation = thread % WIDTH; me = thread; four = min(4u, 4u * workgroups.x);",
    ),
];

/// Stands for the name of an array.
const BUFFER: &str = "BUFFER";

fn every() -> impl Iterator<Item = &'static str> {
    include_str!("emulated.wgsl").split("\n\n")
}

/// A word of matrices or subgroups, as emulated, and what follows it. `None` where it is not known.
fn emulated<'a>(
    word: &str,
    behind: &'a str,
    before: &str,
    functions: &mut BTreeSet<String>,
) -> Option<(String, &'a str)> {
    match word {
        "subgroup" => Some((word.to_owned(), behind)),
        "subgroupShuffleXor" => Some(("shuffle_xor".to_owned(), behind)),
        "coopMultiplyAdd" => Some(("multiply_add".to_owned(), behind)),
        "coop_mat16x16" => role(behind).map(|(role, behind)| (format!("Matrix{role}"), behind)),
        _ => access(word, behind, before, functions),
    }
}

/// What a matrix is to a product, by what follows its type's name.
fn role(text: &str) -> Option<(&'static str, &str)> {
    let roles = [("<f16, A>", "A"), ("<f16, B>", "B"), ("<f32, C>", "C")];
    roles.into_iter().find_map(|(spelled, role)| Some((role, text.strip_prefix(spelled)?)))
}

/// A word that brings matrices from an array or there, up to the place.
fn access<'a>(
    word: &str,
    behind: &'a str,
    before: &str,
    functions: &mut BTreeSet<String>,
) -> Option<(String, &'a str)> {
    let (name, value, behind, needs) = if let Some(behind) = behind.strip_prefix("<coop_mat16x16") {
        let (role, behind) = role(behind)?;
        let needs: &[_] = match role {
            // It is read when it is multiplied, so nothing may happen in between.
            "B" if before.ends_with(", ") || before.ends_with("return ") => &["multiply_add"],
            "B" => return None,
            _ => &[],
        };
        (format!("{word}_{role}"), "", behind.strip_prefix(">(&")?, needs)
    } else {
        let (value, behind) = behind.strip_prefix('(')?.split_once('&')?;
        (word.to_owned(), value, behind, &[][..])
    };
    let (buffer, behind) = behind.split_once('[')?;
    let (place, behind) = behind.split_once(']')?;
    for name in [format!("{name}_{BUFFER}").as_str()].iter().chain(needs) {
        let function = every().find(|function| function.starts_with(&format!("fn {name}(")))?;
        functions.insert(function.replace(BUFFER, buffer));
    }
    Some((format!("{name}_{buffer}({value}{place}"), behind))
}

/// The bytes of the word that a text begins with.
fn word(text: &str) -> usize {
    text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len())
}

/// Where a text has the next word of matrices or subgroups.
fn next(text: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        at += text[at..].find(|c: char| c.is_ascii_alphabetic() || c == '_')?;
        let rest = &text[at..];
        if rest.starts_with("coop") || rest.starts_with("subgroup") {
            return Some(at);
        }
        at += word(rest);
    }
}
