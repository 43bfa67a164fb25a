use crate::{Case, Outcome, ReplayError, reference};

/// How far an [`Outcome`] is from what its [`Case`] expects.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// Largest absolute difference of an output element; NaN if one is NaN.
    pub max_abs_err: f64,
    /// Length of the difference of the outputs over the length of the expected output.
    pub rel_l2: f64,
    /// Largest absolute difference of an LSE; `None` where the backend gave none.
    pub lse_max_abs_err: Option<f64>,
    /// Whether every element of output and LSE is within the case's tolerance.
    pub within_tolerance: bool,
}

impl Comparison {
    /// Compares with the recorded answer; with the f64 reference where the case records none.
    ///
    /// # Errors
    /// A case that contradicts itself; an outcome of another size.
    pub fn of(case: &Case, outcome: &Outcome) -> Result<Self, ReplayError> {
        case.validate()?;
        let lse_missing = outcome.lse.is_some() && case.lse.is_none();
        let computed = if case.out.is_none() || lse_missing { Some(reference::attention_f64(case)?) } else { None };
        let pick = |recorded: &Option<Vec<f32>>, computed: Option<&Vec<f64>>| match recorded {
            Some(values) => values.iter().map(|value| f64::from(*value)).collect(),
            None => computed.cloned().unwrap_or_default(),
        };
        let out = pick(&case.out, computed.as_ref().map(|(out, _)| out));
        let mut distance = Distance::of(case, "out", &outcome.out, &out)?;
        let lse = match &outcome.lse {
            Some(got) => {
                let want = pick(&case.lse, computed.as_ref().map(|(_, lse)| lse));
                Some(Distance::of(case, "lse", got, &want)?)
            }
            None => None,
        };
        distance.within &= lse.as_ref().is_none_or(|lse| lse.within);
        Ok(Self {
            max_abs_err: distance.largest,
            rel_l2: if distance.difference == 0.0 { 0.0 } else { (distance.difference / distance.expected).sqrt() },
            lse_max_abs_err: lse.map(|lse| lse.largest),
            within_tolerance: distance.within,
        })
    }
}

struct Distance {
    largest: f64,
    /// Sum of squared differences.
    difference: f64,
    /// Sum of squared expected values.
    expected: f64,
    within: bool,
}

impl Distance {
    fn of(case: &Case, name: &str, got: &[f32], want: &[f64]) -> Result<Self, ReplayError> {
        if got.len() != want.len() {
            return Err(ReplayError::Case(format!("{name} has {} elements, expected {}", got.len(), want.len())));
        }
        let mut sum = Self { largest: 0.0, difference: 0.0, expected: 0.0, within: true };
        for (got, want) in got.iter().map(|value| f64::from(*value)).zip(want.iter().copied()) {
            // Equal infinities are no distance apart; their difference would be NaN.
            let error = if got == want { 0.0 } else { (got - want).abs() };
            // f64::max drops a NaN.
            sum.largest = if error.is_nan() || sum.largest.is_nan() { f64::NAN } else { sum.largest.max(error) };
            sum.difference += error * error;
            sum.expected += want * want;
            sum.within &= case.tolerance.holds(got, want);
        }
        Ok(sum)
    }
}
