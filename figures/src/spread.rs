//! Median and spread of what rounds have measured.

use serde::Serialize;

/// Median and middle half.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// A quarter is lower.
    pub low: f64,
    /// A quarter is higher.
    pub high: f64,
    /// Of so many.
    pub count: usize,
}

impl Spread {
    /// Of these; `None` of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * values.len().checked_sub(1)? as f64;
            let (below, part) = (place.floor() as usize, place.fract());
            let above = (below + 1).min(values.len() - 1);
            Some(values[below] + (values[above] - values[below]) * part)
        };
        Some(Self { median: at(0.5)?, low: at(0.25)?, high: at(0.75)?, count: values.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_and_the_quartiles_beside() {
        let spread = Spread::of([5.0, 1.0, 3.0, 2.0, 4.0]).expect("values");
        assert_eq!(spread, Spread { median: 3.0, low: 2.0, high: 4.0, count: 5 });
        assert_eq!(Spread::of([1.0, 2.0]).map(|s| s.median), Some(1.5));
        assert_eq!(Spread::of([7.0]).map(|s| (s.low, s.high)), Some((7.0, 7.0)));
        assert_eq!(Spread::of([]), None);
    }
}
