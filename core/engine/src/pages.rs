use crate::EngineError;

/// Hands out the pages of a pool and takes them back.
#[derive(Clone, Debug)]
pub struct PageAllocator {
    free: Vec<i32>,
    total: usize,
}

impl PageAllocator {
    /// A pool of `pages` pages, all free.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        let pages = i32::try_from(pages).unwrap_or(i32::MAX);
        Self { free: (0..pages).rev().collect(), total: pages as usize }
    }

    /// Pages that nobody holds.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Extends `held` to `count` pages; on an error it stays as it is.
    ///
    /// # Errors
    /// [`EngineError::OutOfPages`].
    pub fn grow(&mut self, held: &mut Vec<i32>, count: usize) -> Result<(), EngineError> {
        let needed = count.saturating_sub(held.len());
        if needed > self.free.len() {
            return Err(EngineError::OutOfPages { needed, free: self.free.len(), total: self.total });
        }
        held.extend(self.free.split_off(self.free.len() - needed));
        Ok(())
    }

    /// Takes pages back.
    pub fn release(&mut self, held: &mut Vec<i32>) {
        self.free.append(held);
    }
}

#[cfg(test)]
mod tests {
    use super::PageAllocator;

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
}
