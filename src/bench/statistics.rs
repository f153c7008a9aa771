//! Medians, confidence intervals, and ratios to the baseline.
//!
//! No distribution is assumed: times have long tails and are often bimodal. Intervals are percentile bootstraps (Efron
//! 1979). These are too narrow for few samples (with seven, they cover the median in 88% of cases), so the percentiles
//! are widened in the same way as Student's t widens an interval of the mean (Hesterberg 2015, "expanded percentile").
//! The random seed is fixed, so the same samples always yield the same interval.

use super::report::{Estimate, NoiseLevel, Report, Summary};

/// The confidence level of intervals.
pub const CONFIDENCE: f64 = 0.95;
/// The number of bootstrap samples. The ends of an interval then vary by a few percent of its width.
const RESAMPLES: usize = 1_000;
/// With fewer samples, bootstrap intervals are too narrow and the range is used instead. It covers the median in 94% of
/// cases with five samples, 88% with four, 75% with three, and 50% with two.
const MIN_RESAMPLED: usize = 6;
/// The minimum number of samples for an estimate.
const MIN_SAMPLES: usize = 2;
/// An arbitrary constant.
const SEED: u64 = 0x6875_736b;

/// Outliers are this many interquartile ranges outside of the quartiles (Tukey 1977).
const FENCE: f64 = 1.5;

/// Returns the `at` quantile (0 to 1) of ascending samples, with linear interpolation (Hyndman and Fan 1996, definition
/// 7); 0 if there are none.
pub fn quantile(sorted: &[f64], at: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let position = at.clamp(0.0, 1.0) * as_f64(last);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to the index of the last")]
    let below = position.floor() as usize;
    let low = sorted.get(below).copied().unwrap_or_default();
    let high = sorted.get(below + 1).copied().unwrap_or(low);
    low + (high - low) * (position - position.floor())
}

/// Returns the median.
pub fn median(samples: &[f64]) -> f64 {
    quantile(&sorted(samples), 0.5)
}

/// Returns the interquartile range as a fraction of the median; 0 with fewer than two samples or a median of 0.
pub fn spread(samples: &[f64]) -> f64 {
    let sorted = sorted(samples);
    let middle = quantile(&sorted, 0.5);
    if sorted.len() < MIN_SAMPLES || middle == 0.0 {
        return 0.0;
    }
    (quantile(&sorted, 0.75) - quantile(&sorted, 0.25)) / middle.abs()
}

/// Returns the median with its interval; `None` with fewer than two samples.
pub fn estimate(samples: &[f64]) -> Option<Estimate> {
    let samples = sorted(samples);
    let (Some(&min), Some(&max)) = (samples.first(), samples.last()) else { return None };
    if samples.len() < MIN_SAMPLES {
        return None;
    }
    let value = quantile(&samples, 0.5);
    if samples.len() < MIN_RESAMPLED {
        return Some(Estimate { value, low: min, high: max });
    }
    let mut random = fastrand::Rng::with_seed(SEED);
    Some(interval(value, tail(CONFIDENCE, samples.len()), || resampled_median(&samples, &mut random)))
}

/// Returns the ratio of `samples` to `baseline`: the median of the ratios of each round, so that what slows down a
/// whole round cancels out. `None` if fewer than two rounds succeeded in both.
pub fn paired_ratio(samples: &[Option<f64>], baseline: &[Option<f64>]) -> Option<Estimate> {
    let ratios: Vec<f64> = samples
        .iter()
        .zip(baseline)
        .filter_map(|pair| match pair {
            (Some(sample), Some(base)) if *base > 0.0 => Some(sample / base),
            _ => None,
        })
        .collect();
    estimate(&ratios)
}

/// Returns the ratio of the medians of two independent sets of samples, with an interval at level `confidence`. `None`
/// if either has fewer than two samples, or if the denominator may be 0.
pub fn unpaired_ratio(samples: &[f64], others: &[f64], confidence: f64) -> Option<Estimate> {
    let (samples, others) = (sorted(samples), sorted(others));
    let smaller = samples.len().min(others.len());
    if smaller < MIN_SAMPLES || others.first().is_none_or(|min| *min <= 0.0) {
        return None;
    }
    let value = quantile(&samples, 0.5) / quantile(&others, 0.5);
    if smaller < MIN_RESAMPLED {
        let ends = |sorted: &[f64]| (quantile(sorted, 0.0), quantile(sorted, 1.0));
        let ((min, max), (others_min, others_max)) = (ends(&samples), ends(&others));
        return Some(Estimate { value, low: min / others_max, high: max / others_min });
    }
    let mut random = fastrand::Rng::with_seed(SEED);
    let draw = || resampled_median(&samples, &mut random) / resampled_median(&others, &mut random);
    Some(interval(value, tail(confidence, smaller), draw))
}

/// Whether the half-width of the interval is at most the fraction `precision` of the median. Too few samples for a
/// bootstrap are never enough, even if they are equal.
pub fn is_precise_enough(samples: &[Option<f64>], precision: f64) -> bool {
    let samples = finite(samples);
    samples.len() >= MIN_RESAMPLED
        && estimate(&samples).is_some_and(|median| (median.high - median.low) / 2.0 <= precision * median.value.abs())
}

/// Classifies the noise of a host, by the spread of its reference work and the fraction of stolen CPU time.
pub fn noise_level(spread: f64, stolen: f64) -> NoiseLevel {
    match (spread, stolen) {
        (spread, stolen) if spread <= 0.05 && stolen <= 0.01 => NoiseLevel::Quiet,
        (spread, stolen) if spread <= 0.25 && stolen <= 0.10 => NoiseLevel::Noisy,
        _ => NoiseLevel::TooNoisy,
    }
}

/// Fills in the summary and the ratio of every outcome. Samples that are not finite are dropped first.
pub fn summarize(report: &mut Report) {
    for metric in &mut report.metrics {
        for outcome in &mut metric.results {
            for sample in &mut outcome.samples {
                *sample = sample.filter(|sample| sample.is_finite());
            }
        }
        let baseline = metric
            .results
            .iter()
            .find(|outcome| outcome.contender == report.method.baseline)
            .map(|outcome| outcome.samples.clone());
        for outcome in &mut metric.results {
            outcome.summary = summary(&outcome.samples);
            outcome.ratio = baseline.as_ref().and_then(|baseline| paired_ratio(&outcome.samples, baseline));
        }
    }
}

/// Returns summary statistics; `None` with fewer than two samples.
pub fn summary(samples: &[Option<f64>]) -> Option<Summary> {
    let values = sorted(&finite(samples));
    Some(Summary {
        median: estimate(&values)?,
        min: *values.first()?,
        max: *values.last()?,
        outliers: outliers(samples),
    })
}

/// Returns the rounds, from 0, of outliers; none with fewer than six samples.
pub fn outliers(samples: &[Option<f64>]) -> Vec<u32> {
    let values = sorted(&finite(samples));
    if values.len() < MIN_RESAMPLED {
        return Vec::new();
    }
    let (first, third) = (quantile(&values, 0.25), quantile(&values, 0.75));
    let fence = FENCE * (third - first);
    (0_u32..)
        .zip(samples)
        .filter(|(_, sample)| sample.is_some_and(|value| value < first - fence || value > third + fence))
        .map(|(round, _)| round)
        .collect()
}

/// Returns the values of successful rounds.
pub fn finite(samples: &[Option<f64>]) -> Vec<f64> {
    samples.iter().flatten().copied().filter(|sample| sample.is_finite()).collect()
}

/// Returns the finite samples in ascending order.
fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = samples.iter().copied().filter(|sample| sample.is_finite()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// Returns the median of a bootstrap sample.
fn resampled_median(sorted: &[f64], random: &mut fastrand::Rng) -> f64 {
    // Counting ranks is faster than sorting.
    let mut times = vec![0_usize; sorted.len()];
    for _ in 0..sorted.len() {
        if let Some(count) = times.get_mut(random.usize(0..sorted.len())) {
            *count += 1;
        }
    }
    let nth = |nth: usize| {
        let mut seen = 0;
        let ranked = times.iter().zip(sorted).find(|(count, _)| {
            seen += **count;
            seen > nth
        });
        ranked.map_or(0.0, |(_, sample)| *sample)
    };
    let half = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { f64::midpoint(nth(half - 1), nth(half)) } else { nth(half) }
}

/// Returns the percentile interval of many draws, around `value`.
fn interval(value: f64, tail: f64, mut draw: impl FnMut() -> f64) -> Estimate {
    let mut draws: Vec<f64> = (0..RESAMPLES).map(|_| draw()).collect();
    draws.sort_unstable_by(f64::total_cmp);
    Estimate { value, low: quantile(&draws, tail).min(value), high: quantile(&draws, 1.0 - tail).max(value) }
}

/// Returns the fraction of draws beyond either end of an interval.
fn tail(confidence: f64, samples: usize) -> f64 {
    let tail = (1.0 - confidence) / 2.0;
    let freedom = as_f64(samples) - 1.0;
    // The normal quantile, by bisection, then Student's t (Abramowitz and Stegun 26.7.5).
    let (mut low, mut high) = (0.0, 8.0);
    for _ in 0..50 {
        let middle = f64::midpoint(low, high);
        if normal_tail(middle) > tail { low = middle } else { high = middle }
    }
    let (z, z3, z5, z7) = (low, low.powi(3), low.powi(5), low.powi(7));
    let student = z
        + (z3 + z) / (4.0 * freedom)
        + (5.0 * z5 + 16.0 * z3 + 3.0 * z) / (96.0 * freedom.powi(2))
        + (3.0 * z7 + 19.0 * z5 + 17.0 * z3 - 15.0 * z) / (384.0 * freedom.powi(3));
    normal_tail(student * ((freedom + 1.0) / freedom).sqrt())
}

/// Returns the upper tail of the standard normal distribution, for nonnegative `z` (Abramowitz and Stegun 26.2.17).
fn normal_tail(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z);
    let polynomial = [1.330_274_429, -1.821_255_978, 1.781_477_937, -0.356_563_782, 0.319_381_530]
        .iter()
        .fold(0.0, |sum, coefficient| (sum + coefficient) * t);
    (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt() * polynomial
}

fn as_f64(count: usize) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "counts of samples are small")]
    let count = count as f64;
    count
}

#[cfg(test)]
mod tests;
