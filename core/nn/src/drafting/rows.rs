//! What a drafter keeps of each sequence from one step to the next: one row.

use std::collections::HashMap;

use polyattn_device::{Buffer, BufferSlice, Commands, Device};

use crate::{NnError, ops};

/// One row of f32 for each sequence, on a device. Rows come from the hidden states of a pass, and stay until the next
/// ones replace them.
///
/// A recording may hold one [`put`](Self::put) and one [`gather`](Self::gather): each has its indices in memory of its
/// own, written before the recording runs.
#[derive(Debug)]
pub struct RowStore {
    device: Device,
    width: u32,
    /// Rows from one sequence's to the next, so that each starts where a binding may.
    spacing: u32,
    /// Indices from one sequence's to the next, likewise.
    index_spacing: u32,
    rows: Buffer,
    capacity: u32,
    sequences: HashMap<u64, Kept>,
    free: Vec<u32>,
    put_indices: Buffer,
    gather_indices: Buffer,
    most: u32,
}

#[derive(Clone, Copy, Debug)]
struct Kept {
    slot: u32,
    position: u32,
}

/// A row to keep.
#[derive(Clone, Copy, Debug)]
pub struct NewRow {
    /// Its sequence.
    pub sequence: u64,
    /// Its place in the buffer it comes from.
    pub row: u32,
    /// Its position in the sequence.
    pub position: u32,
}

impl RowStore {
    /// A store of rows of `width` elements, of which up to `sequences` are put or gathered at once. It holds as many
    /// sequences as come.
    ///
    /// # Errors
    /// No memory.
    pub fn new(device: &Device, width: u32, sequences: u32) -> Result<Self, NnError> {
        let alignment = device.facts().limits.offset_alignment.max(4);
        let sequences = sequences.max(1);
        let index_spacing = alignment.div_ceil(4);
        let spacing = (1..=alignment).find(|rows| (rows * width * 4).is_multiple_of(alignment)).unwrap_or(1);
        let words = |count: u32| u64::from(count) * 4;
        Ok(Self {
            width,
            spacing,
            index_spacing,
            rows: device.alloc(words(sequences * spacing * width), "kept rows")?,
            capacity: sequences,
            sequences: HashMap::new(),
            free: (0..sequences).rev().collect(),
            put_indices: device.alloc(words(sequences * index_spacing), "rows to keep")?,
            gather_indices: device.alloc(words(sequences), "kept rows to fetch")?,
            most: sequences,
            device: device.clone(),
        })
    }

    /// The position of a sequence's row.
    #[must_use]
    pub fn position(&self, sequence: u64) -> Option<u32> {
        self.sequences.get(&sequence).map(|kept| kept.position)
    }

    /// Records that these rows of `from` `[_, width]` f32 replace those that are there.
    ///
    /// # Errors
    /// More rows than were spoken of; no memory; the device.
    pub fn put(&mut self, commands: &mut Commands, from: BufferSlice<'_>, new: &[NewRow]) -> Result<(), NnError> {
        self.check(new.len())?;
        let mut indices = vec![0; new.len() * self.index_spacing as usize];
        for (place, row) in new.iter().enumerate() {
            indices[place * self.index_spacing as usize] = row.row;
        }
        self.device.write(&self.put_indices, 0, &indices)?;
        for (place, NewRow { sequence, position, .. }) in (0u64..).zip(new) {
            let slot = match self.sequences.get(sequence) {
                Some(kept) => kept.slot,
                None => self.free_slot(commands)?,
            };
            self.sequences.insert(*sequence, Kept { slot, position: *position });
            let index = self.put_indices.slice(place * u64::from(self.index_spacing) * 4, 4)?;
            let bytes = u64::from(self.width) * 4;
            let to = self.rows.slice(u64::from(slot * self.spacing) * bytes, bytes)?;
            ops::gather_rows(commands, from, self.width, index, 1, to)?;
        }
        Ok(())
    }

    /// Records the rows of these sequences, one below the other, into `out` `[sequences, width]`.
    ///
    /// # Errors
    /// A sequence without a row; more than were spoken of; the device.
    pub fn gather(&self, commands: &mut Commands, sequences: &[u64], out: BufferSlice<'_>) -> Result<(), NnError> {
        self.check(sequences.len())?;
        let indices = sequences.iter().map(|sequence| {
            let kept = self.sequences.get(sequence).map(|kept| kept.slot * self.spacing);
            kept.ok_or_else(|| NnError::Shape(format!("nothing is kept of sequence {sequence}")))
        });
        let indices = indices.collect::<Result<Vec<_>, _>>()?;
        self.device.write(&self.gather_indices, 0, &indices)?;
        let (from, indices) = (self.rows.whole(), self.gather_indices.whole());
        Ok(ops::gather_rows(commands, from, self.width, indices, sequences.len() as u32, out)?)
    }

    /// Forgets a sequence.
    pub fn forget(&mut self, sequence: u64) {
        if let Some(kept) = self.sequences.remove(&sequence) {
            self.free.push(kept.slot);
        }
    }

    fn check(&self, count: usize) -> Result<(), NnError> {
        match count > self.most as usize {
            true => Err(NnError::Shape(format!("{count} sequences in one step, at most {}", self.most))),
            false => Ok(()),
        }
    }

    fn free_slot(&mut self, commands: &mut Commands) -> Result<u32, NnError> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        let larger = self.device.alloc(self.rows.bytes() * 2, "kept rows")?;
        commands.copy(self.rows.whole(), larger.slice(0, self.rows.bytes())?)?;
        self.rows = larger;
        self.free.extend((self.capacity..self.capacity * 2).rev());
        self.capacity *= 2;
        self.free_slot(commands)
    }
}
