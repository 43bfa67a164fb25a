use std::collections::{BTreeMap, HashMap};

use crate::EngineError;

/// Hands out the pages of a pool and takes them back. A page may have several holders; one whose tokens are known stays
/// when nobody holds it, for the next text that begins with them, until its room is needed.
#[derive(Clone, Debug)]
pub struct PageAllocator {
    free: Vec<i32>,
    total: usize,
    /// Holders of each page.
    held: Vec<u32>,
    known: HashMap<Prefix, Known>,
    /// What each page is known by.
    names: HashMap<i32, Prefix>,
    /// Known pages without a holder, the longest unused first.
    idle: BTreeMap<u64, i32>,
    clock: u64,
}

/// A page's worth of tokens behind another such page: the whole text up to them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Prefix {
    /// The page before, by number; a kind of pages for the first.
    behind: u64,
    tokens: Box<[u32]>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    page: i32,
    number: u64,
    /// When it became idle.
    since: u64,
}

/// What a page holds beside the target's keys and values: pages of the two kinds are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Nothing.
    Plain,
    /// The drafter's state too.
    Drafted,
}

impl PageAllocator {
    /// A pool of `pages` pages, all free.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        let pages = i32::try_from(pages).unwrap_or(i32::MAX);
        Self {
            free: (0..pages).rev().collect(),
            total: pages as usize,
            held: vec![0; pages as usize],
            known: HashMap::new(),
            names: HashMap::new(),
            idle: BTreeMap::new(),
            // Numbers below stand for kinds.
            clock: 2,
        }
    }

    /// Pages that nobody holds.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages of the pool.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// Extends `held` to `count` pages; on an error it stays as it is.
    ///
    /// # Errors
    /// [`EngineError::OutOfPages`].
    pub fn grow(&mut self, held: &mut Vec<i32>, count: usize) -> Result<(), EngineError> {
        let needed = count.saturating_sub(held.len());
        if needed > self.free() {
            return Err(EngineError::OutOfPages { needed, free: self.free(), total: self.total });
        }
        while self.free.len() < needed
            && let Some((_, page)) = self.idle.pop_first()
        {
            if let Some(name) = self.names.remove(&page) {
                self.known.remove(&name);
            }
            self.free.push(page);
        }
        for page in self.free.split_off(self.free.len() - needed) {
            self.held[page as usize] = 1;
            held.push(page);
        }
        Ok(())
    }

    /// Takes pages back.
    pub fn release(&mut self, held: &mut Vec<i32>) {
        // The last first, so that the end of a text makes room before its beginning.
        while let Some(page) = held.pop() {
            let holders = &mut self.held[page as usize];
            *holders = holders.saturating_sub(1);
            if *holders > 0 {
                continue;
            }
            self.clock += 1;
            match self.names.get(&page).and_then(|name| self.known.get_mut(name)) {
                Some(known) => {
                    known.since = self.clock;
                    self.idle.insert(self.clock, page);
                }
                None => self.free.push(page),
            }
        }
    }

    /// The known pages of the beginning of `tokens`, at most `most` of them, which the caller now holds.
    pub fn begin(&mut self, kind: PageKind, tokens: &[u32], page_size: u32, most: usize) -> Vec<i32> {
        let mut pages = Vec::new();
        let mut behind = kind as u64;
        for tokens in tokens.chunks_exact(page_size as usize).take(most) {
            let Some(known) = self.known.get(&Prefix { behind, tokens: tokens.into() }) else { break };
            let holders = &mut self.held[known.page as usize];
            if *holders == 0 {
                self.idle.remove(&known.since);
            }
            *holders += 1;
            pages.push(known.page);
            behind = known.number;
        }
        pages
    }

    /// Makes known that `pages` hold `tokens` from the beginning of a text on; only whole pages count.
    pub fn know(&mut self, kind: PageKind, tokens: &[u32], pages: &[i32], page_size: u32) {
        let mut behind = kind as u64;
        for (tokens, page) in tokens.chunks_exact(page_size as usize).zip(pages) {
            let name = Prefix { behind, tokens: tokens.into() };
            behind = match self.known.get(&name) {
                // Another text came first; this page is known by no name, or by its own.
                Some(known) => known.number,
                None if self.names.contains_key(page) => break,
                None => {
                    self.clock += 1;
                    self.known.insert(name.clone(), Known { page: *page, number: self.clock, since: 0 });
                    self.names.insert(*page, name);
                    self.clock
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{PageAllocator, PageKind};

    #[test]
    fn grows_all_or_nothing_and_takes_back() {
        let mut pool = PageAllocator::new(4);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        pool.grow(&mut a, 3).unwrap();
        pool.grow(&mut a, 2).unwrap();
        assert_eq!((a.len(), pool.free()), (3, 1));
        let error = pool.grow(&mut b, 2).unwrap_err().to_string();
        assert_eq!(error, "out of cache pages: 2 more needed, 1 of 4 free");
        assert!(b.is_empty());
        pool.release(&mut a);
        pool.grow(&mut b, 4).unwrap();
        b.sort_unstable();
        assert_eq!(b, [0, 1, 2, 3]);
    }

    #[test]
    fn pages_are_shared_and_stay_until_needed() {
        let mut pool = PageAllocator::new(4);
        let text = [1, 2, 3, 4, 5, 6, 7];
        let mut a = Vec::new();
        pool.grow(&mut a, 4).unwrap();
        pool.know(PageKind::Plain, &text, &a, 2);
        let (first, second) = (a[0], a[1]);
        let mut b = pool.begin(PageKind::Plain, &[1, 2, 3, 4, 9, 9], 2, 9);
        assert_eq!(b, [first, second], "the third page begins with another token");
        assert!(pool.begin(PageKind::Drafted, &text, 2, 9).is_empty());
        assert!(pool.begin(PageKind::Plain, &[3, 4], 2, 9).is_empty(), "the same tokens behind others are others");
        pool.release(&mut a);
        assert_eq!(pool.free(), 2, "two pages are b's");
        pool.release(&mut b);
        assert_eq!(pool.free(), 4);
        // Two fresh pages: the unknown one, then the end of the text.
        pool.grow(&mut a, 2).unwrap();
        let mut c = pool.begin(PageKind::Plain, &text, 2, 9);
        assert_eq!(c, [first, second]);
        pool.release(&mut c);
        pool.release(&mut a);
        pool.grow(&mut b, 4).unwrap();
        assert!(pool.begin(PageKind::Plain, &text, 2, 9).is_empty(), "their room was needed");
    }
}
