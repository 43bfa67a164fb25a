//! Whether two models mean the same by an id.

use polyattn_api::ProposerError;
use polyattn_nn::load::TextTokenizer;

/// Every id of the draft model must stand for the text it stands for in the target.
pub(crate) fn check_same(draft: &TextTokenizer, target: &TextTokenizer) -> Result<(), ProposerError> {
    let ids = draft.vocab_size().max(target.vocab_size()) as u32;
    match (0..ids).find(|id| draft.token_text(*id) != target.token_text(*id)) {
        None => Ok(()),
        Some(id) => {
            let says = |tokenizer: &TextTokenizer| match tokenizer.token_text(id) {
                Some(text) => format!("{text:?}"),
                None => "no token".into(),
            };
            Err(ProposerError::Mismatch(format!(
                "the tokenizers differ: id {id} is {} in {}, {} in {}",
                says(draft),
                draft.file().display(),
                says(target),
                target.file().display()
            )))
        }
    }
}
