//! Drafted ids on their way from passes over all sequences to one chain for each.

use polyattn_api::{DraftSequence, Proposal, ProposerError};
use polyattn_device::{Buffer, BufferSlice, Commands, Device, DeviceError};

use crate::{NnError, ops};

/// Chains under way on a device: column by column, the anchors first, one id for each sequence that wants as many. A
/// recording may hold one draft, as its anchors and its order are written before it runs.
#[derive(Debug)]
pub struct Chains {
    device: Device,
    sequences: u32,
    tokens: u32,
    /// Ids from one column to the next, so that each starts where a binding may.
    stride: u32,
    columns: Buffer,
    order: Buffer,
    drafts: Buffer,
}

/// Which sequences are drafted for, and how far.
#[derive(Clone, Debug)]
pub struct ChainOrder {
    counts: Vec<u32>,
    /// The place of the sequence of each row, those that want most first.
    rows: Vec<usize>,
}

impl ChainOrder {
    /// An order for sequences that want so many tokens each.
    #[must_use]
    pub fn new(counts: Vec<u32>) -> Self {
        let mut rows: Vec<usize> = (0..counts.len()).filter(|place| counts[*place] > 0).collect();
        rows.sort_by_key(|place| std::cmp::Reverse(counts[*place]));
        Self { counts, rows }
    }

    /// The place among the sequences of each row.
    #[must_use]
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// Tokens of the longest chain.
    #[must_use]
    pub fn longest(&self) -> u32 {
        self.rows.first().map_or(0, |place| self.counts[*place])
    }

    /// Rows that want more than `pass` tokens: the first ones.
    #[must_use]
    pub fn rows_beyond(&self, pass: u32) -> u32 {
        self.rows.iter().take_while(|place| self.counts[**place] > pass).count() as u32
    }

    /// No draft for anybody.
    #[must_use]
    pub fn nothing(&self) -> Proposal {
        Proposal::Host(vec![Default::default(); self.counts.len()])
    }
}

impl Chains {
    /// Chains of up to `tokens` tokens for up to `sequences` sequences at once.
    ///
    /// # Errors
    /// No memory.
    pub fn new(device: &Device, sequences: u32, tokens: u32) -> Result<Self, DeviceError> {
        let stride = sequences.next_multiple_of(device.facts().limits.offset_alignment.div_ceil(4).max(1));
        let words = |rows: u32| u64::from(rows) * u64::from(tokens + 1) * 4;
        Ok(Self {
            device: device.clone(),
            sequences,
            tokens,
            stride,
            columns: device.alloc(words(stride), "draft columns")?,
            order: device.alloc(words(sequences), "draft order")?,
            drafts: device.alloc(words(sequences), "drafts")?,
        })
    }

    /// Sequences at once at the most.
    #[must_use]
    pub fn sequences(&self) -> u32 {
        self.sequences
    }

    /// Tokens of a chain at the most.
    #[must_use]
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Elements from one column to the next, of other numbers that are laid out likewise.
    #[must_use]
    pub fn stride(&self) -> u32 {
        self.stride
    }

    /// Starts chains behind the anchors of these sequences.
    ///
    /// # Errors
    /// More sequences or longer chains than there is room for; the device.
    pub fn begin(&self, sequences: &[DraftSequence<'_>], order: &ChainOrder) -> Result<(), ProposerError> {
        if sequences.len() > self.sequences as usize || order.longest() > self.tokens {
            return Err(ProposerError::Unsupported(format!(
                "{} sequences of up to {} tokens in one step, at most {} of {}",
                sequences.len(),
                order.longest(),
                self.sequences,
                self.tokens
            )));
        }
        let anchor = |place: &usize| sequences[*place].tokens.last().copied().unwrap_or_default();
        let anchors: Vec<u32> = order.rows.iter().map(anchor).collect();
        Ok(self.device.write(&self.columns, 0, &anchors)?)
    }

    /// A column: 0 are the anchors, n the n-th drafted tokens.
    ///
    /// # Errors
    /// A column beyond the last.
    pub fn column(&self, number: u32) -> Result<BufferSlice<'_>, DeviceError> {
        let bytes = u64::from(self.stride) * 4;
        self.columns.slice(u64::from(number) * bytes, bytes)
    }

    /// Records the chains as a proposal.
    ///
    /// # Errors
    /// The device.
    pub fn finish(&self, commands: &mut Commands, order: ChainOrder) -> Result<Proposal, NnError> {
        let width = order.longest() as usize + 1;
        let mut places = vec![0; order.counts.len() * width];
        for (row, place) in (0..).zip(&order.rows) {
            for column in 0..=order.counts[*place] {
                places[place * width + column as usize] = column * self.stride + row;
            }
        }
        self.device.write(&self.order, 0, &places)?;
        let (columns, drafts) = (self.columns.whole(), self.drafts.whole());
        ops::gather_rows(commands, columns, 1, self.order.whole(), places.len() as u32, drafts)?;
        Ok(Proposal::Device { ids: self.drafts.clone(), stride: width as u32, counts: order.counts })
    }
}
