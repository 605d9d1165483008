//! What is under way, by its number: a few at a time, which come in the order of their numbers and go soon. Used by the world
//! where a map would allocate and free memory for nearly each of them.

/// In ascending order of their numbers.
#[derive(Clone, Debug)]
pub struct Numbered<T>(Vec<(u64, T)>);

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Numbered<T> {
    fn find(&self, number: u64) -> Result<usize, usize> {
        self.0.binary_search_by_key(&number, |&(other, _)| other)
    }

    /// The number is a new one.
    pub fn insert(&mut self, number: u64, value: T) {
        match self.find(number) {
            Ok(_) => panic!("number {number} is used twice"),
            Err(place) => self.0.insert(place, (number, value)),
        }
    }

    pub fn remove(&mut self, number: u64) -> Option<T> {
        let place = self.find(number).ok()?;
        Some(self.0.remove(place).1)
    }

    pub fn numbers(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().map(|&(number, _)| number)
    }

    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, value)| value)
    }

    /// All of them; none is left.
    pub fn take(&mut self) -> Vec<T> {
        let all = std::mem::take(&mut self.0);
        all.into_iter().map(|(_, value)| value).collect()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_any_order_is_kept_by_number_and_goes_once() {
        let mut some = Numbered::default();
        for number in [3, 9, 5, 7] {
            some.insert(number, number * 10);
        }
        assert_eq!(some.remove(5), Some(50));
        assert_eq!(some.remove(5), None);
        assert_eq!(some.numbers().collect::<Vec<_>>(), [3, 7, 9]);
        assert_eq!(some.values().copied().collect::<Vec<_>>(), [30, 70, 90]);
        assert_eq!(some.take(), [30, 70, 90]);
        assert!(some.is_empty());
    }

    #[test]
    #[should_panic(expected = "used twice")]
    fn a_number_is_used_once() {
        let mut some = Numbered::default();
        some.insert(1, ());
        some.insert(1, ());
    }
}
