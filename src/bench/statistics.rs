//! From samples to what they say: medians, the intervals in which those may truly be, and ratios to the baseline's.
//!
//! Nothing is assumed of a distribution: times have long tails, and often two humps. Intervals are percentile bootstraps (Efron
//! 1979): samples are drawn anew from the samples, with replacement, and the middle 95% of the medians are kept. Of few samples
//! that is too narrow (of seven, it holds the median in 88% of cases), and so a wider share is kept, by which an interval of a
//! mean would become Student's (Hesterberg 2015, "expanded percentile"). The draws come from a fixed seed, so the same samples
//! always give the same interval.

use super::result::{Estimate, Report, Steadiness, Summary};

/// The share of cases in which an interval holds the true median.
pub const CONFIDENCE: f64 = 0.95;
/// How often samples are drawn anew: the interval's ends are then steady to a few percent of its width.
const RESAMPLES: usize = 1_000;
/// With fewer samples than this, resampling claims too much: the interval is all of them, from the least to the greatest, which
/// holds the median in 94% of cases with five samples, 88% with four, 75% with three, 50% with two.
const FEWEST_RESAMPLED: usize = 6;
/// Fewer samples say nothing of where the median is.
const FEWEST: usize = 2;
/// Any will do; it only must not change.
const SEED: u64 = 0x6875_736b;

/// How many widths of the middle half a sample stands beyond it to be an outlier (Tukey 1977).
const FENCE: f64 = 1.5;

/// The value below which the share `at` (0 to 1) of the samples lies, between two of them in proportion (Hyndman and Fan 1996,
/// definition 7). `sorted` is in ascending order; of none it is 0.
pub fn quantile(sorted: &[f64], at: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let position = at.clamp(0.0, 1.0) * as_f64(last);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to the index of the last")]
    let below = position.floor() as usize;
    let low = sorted.get(below).copied().unwrap_or_default();
    let high = sorted.get(below + 1).copied().unwrap_or(low);
    low + (high - low) * (position - position.floor())
}

/// The middle value, or the middle between the two middle ones.
pub fn median(samples: &[f64]) -> f64 {
    quantile(&sorted(samples), 0.5)
}

/// The middle half's width as a share of the median: how much the same thing differs from one time to another. It is 0 of
/// fewer than two samples, or where the median is 0.
pub fn spread(samples: &[f64]) -> f64 {
    let sorted = sorted(samples);
    let middle = quantile(&sorted, 0.5);
    if sorted.len() < FEWEST || middle == 0.0 {
        return 0.0;
    }
    (quantile(&sorted, 0.75) - quantile(&sorted, 0.25)) / middle.abs()
}

/// The median and its interval; none of fewer than two samples.
pub fn estimate(samples: &[f64]) -> Option<Estimate> {
    let samples = sorted(samples);
    let (Some(&least), Some(&greatest)) = (samples.first(), samples.last()) else { return None };
    if samples.len() < FEWEST {
        return None;
    }
    let value = quantile(&samples, 0.5);
    if samples.len() < FEWEST_RESAMPLED {
        return Some(Estimate { value, low: least, high: greatest });
    }
    let mut random = fastrand::Rng::with_seed(SEED);
    Some(interval(value, tail(CONFIDENCE, samples.len()), || drawn_median(&samples, &mut random)))
}

/// What `samples` are in proportion to `baseline`: the median of the ratios of those of the same round, so that what slows a
/// whole round down, as the host's other work does, cancels out. None with fewer than two rounds in which both succeeded.
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

/// The median of `samples` in proportion to that of `others`, taken at another time, so that no two belong together. The
/// interval holds the true ratio in the share `confidence` of cases. None where either has fewer than two samples, or where
/// the others' may be 0.
pub fn unpaired_ratio(samples: &[f64], others: &[f64], confidence: f64) -> Option<Estimate> {
    let (samples, others) = (sorted(samples), sorted(others));
    let fewest = samples.len().min(others.len());
    if fewest < FEWEST || others.first().is_none_or(|least| *least <= 0.0) {
        return None;
    }
    let value = quantile(&samples, 0.5) / quantile(&others, 0.5);
    if fewest < FEWEST_RESAMPLED {
        let ends = |sorted: &[f64]| (quantile(sorted, 0.0), quantile(sorted, 1.0));
        let ((least, greatest), (others_least, others_greatest)) = (ends(&samples), ends(&others));
        return Some(Estimate { value, low: least / others_greatest, high: greatest / others_least });
    }
    let mut random = fastrand::Rng::with_seed(SEED);
    let draw = || drawn_median(&samples, &mut random) / drawn_median(&others, &mut random);
    Some(interval(value, tail(confidence, fewest), draw))
}

/// Whether the interval is narrow enough that no more rounds are needed: its half width is at most the share `precision` of
/// the value. Fewer samples than can be resampled are never enough, whatever they agree on.
pub fn is_enough(samples: &[Option<f64>], precision: f64) -> bool {
    let samples = finite(samples);
    samples.len() >= FEWEST_RESAMPLED
        && estimate(&samples).is_some_and(|median| (median.high - median.low) / 2.0 <= precision * median.value.abs())
}

/// What a host's spread at the same work (a share of the median), and the time stolen from it (a share of all), allow.
pub fn steadiness(spread: f64, stolen: f64) -> Steadiness {
    match (spread, stolen) {
        (spread, stolen) if spread <= 0.05 && stolen <= 0.01 => Steadiness::Quiet,
        (spread, stolen) if spread <= 0.25 && stolen <= 0.10 => Steadiness::Noisy,
        _ => Steadiness::TooNoisy,
    }
}

/// Fills in every outcome's summary and its ratio to the baseline. What is no finite number is taken out of the samples first.
pub fn summarise(report: &mut Report) {
    for measure in &mut report.measures {
        for outcome in &mut measure.results {
            for sample in &mut outcome.samples {
                *sample = sample.filter(|sample| sample.is_finite());
            }
        }
        let baseline = measure
            .results
            .iter()
            .find(|outcome| outcome.contender == report.method.baseline)
            .map(|outcome| outcome.samples.clone());
        for outcome in &mut measure.results {
            outcome.summary = summary(&outcome.samples);
            outcome.ratio = baseline.as_ref().and_then(|baseline| paired_ratio(&outcome.samples, baseline));
        }
    }
}

/// What the samples say; none of fewer than two.
pub fn summary(samples: &[Option<f64>]) -> Option<Summary> {
    let values = sorted(&finite(samples));
    Some(Summary {
        median: estimate(&values)?,
        least: *values.first()?,
        greatest: *values.last()?,
        outliers: outliers(samples),
    })
}

/// The rounds, from 0, whose value lies further from the middle half than one and a half of its widths. Below six samples there
/// is no saying.
pub fn outliers(samples: &[Option<f64>]) -> Vec<u32> {
    let values = sorted(&finite(samples));
    if values.len() < FEWEST_RESAMPLED {
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

/// The values of those rounds that succeeded.
pub fn finite(samples: &[Option<f64>]) -> Vec<f64> {
    samples.iter().flatten().copied().filter(|sample| sample.is_finite()).collect()
}

/// Those that are numbers, in ascending order.
fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = samples.iter().copied().filter(|sample| sample.is_finite()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// The median of as many samples as there are, drawn from them with replacement.
fn drawn_median(sorted: &[f64], random: &mut fastrand::Rng) -> f64 {
    // Ranks stand for the samples: they are counted, which is quicker than to sort.
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

/// Many draws without the share `tail` at either end, around `value`.
fn interval(value: f64, tail: f64, mut draw: impl FnMut() -> f64) -> Estimate {
    let mut draws: Vec<f64> = (0..RESAMPLES).map(|_| draw()).collect();
    draws.sort_unstable_by(f64::total_cmp);
    Estimate { value, low: quantile(&draws, tail).min(value), high: quantile(&draws, 1.0 - tail).max(value) }
}

/// The share of draws left out at either end, for an interval of this confidence from so many samples.
fn tail(confidence: f64, samples: usize) -> f64 {
    let tail = (1.0 - confidence) / 2.0;
    let freedom = as_f64(samples) - 1.0;
    // The normal distribution's point with that share beyond it, by halving; then Student's (Abramowitz and Stegun 26.7.5).
    let (mut low, mut high) = (0.0, 8.0);
    for _ in 0..50 {
        let middle = f64::midpoint(low, high);
        if beyond(middle) > tail { low = middle } else { high = middle }
    }
    let (z, z3, z5, z7) = (low, low.powi(3), low.powi(5), low.powi(7));
    let student = z
        + (z3 + z) / (4.0 * freedom)
        + (5.0 * z5 + 16.0 * z3 + 3.0 * z) / (96.0 * freedom.powi(2))
        + (3.0 * z7 + 19.0 * z5 + 17.0 * z3 - 15.0 * z) / (384.0 * freedom.powi(3));
    beyond(student * ((freedom + 1.0) / freedom).sqrt())
}

/// The share of a normal distribution beyond `z` deviations, `z` not negative (Abramowitz and Stegun 26.2.17).
fn beyond(z: f64) -> f64 {
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
mod tests {
    use super::*;
    use crate::bench::sample::{self, normal};

    /// Of many sets of samples of a distribution, the share whose interval holds its true median.
    fn coverage(size: usize, truth: f64, mut draw: impl FnMut(&mut fastrand::Rng) -> f64) -> f64 {
        const SETS: u32 = 200;
        let held = (0..SETS)
            .filter(|set| {
                let mut random = fastrand::Rng::with_seed(u64::from(*set));
                let samples: Vec<f64> = (0..size).map(|_| draw(&mut random)).collect();
                let median = estimate(&samples).unwrap();
                median.low <= truth && truth <= median.high
            })
            .count();
        as_f64(held) / f64::from(SETS)
    }

    #[test]
    fn an_interval_holds_the_true_median_as_often_as_it_says() {
        let lognormal = |random: &mut fastrand::Rng| (1.0 + 0.8 * normal(random)).exp();
        // A third of the samples come from a second hump, at three times the first, which is uniform from 9 to 11: half
        // of all samples lie below 10.5.
        let bimodal = |random: &mut fastrand::Rng| {
            if random.f64() < 1.0 / 3.0 { 30.0 + normal(random) } else { 9.0 + 2.0 * random.f64() }
        };
        for size in [6, 9, 14, 30] {
            for (name, share) in [
                ("normal", coverage(size, 100.0, |random| 100.0 + 5.0 * normal(random))),
                ("lognormal", coverage(size, 1_f64.exp(), lognormal)),
                ("bimodal", coverage(size, 10.5, bimodal)),
            ] {
                // With 200 sets, what is 0.95 is seen within 0.045; of few samples, an interval ends at one of them, and holds more.
                assert!((0.905..=0.995).contains(&share), "{name}, {size} samples: {share}");
            }
        }
    }

    #[test]
    fn fewer_samples_keep_more_of_the_draws() {
        // From tables: z(0.975) = 1.960, t(0.975; 6) = 2.447, t(0.975; 19) = 2.093, t(0.995; 9) = 3.250.
        for (confidence, samples, z) in
            [(0.95, 7, 2.447), (0.95, 20, 2.093), (0.99, 10, 3.250), (0.95, 1_000_000, 1.960)]
        {
            let expected = beyond(z * (as_f64(samples) / (as_f64(samples) - 1.0)).sqrt());
            let tail = tail(confidence, samples);
            assert!((tail / expected - 1.0).abs() < 0.01, "{samples}: {tail} {expected}");
        }
        assert!((beyond(1.959_964) - 0.025).abs() < 1e-6);
        assert!((beyond(0.0) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn few_samples_give_all_of_their_range() {
        assert_eq!(estimate(&[]), None);
        assert_eq!(estimate(&[3.0]), None);
        assert_eq!(estimate(&[5.0, 1.0, 2.0]), Some(Estimate { value: 2.0, low: 1.0, high: 5.0 }));
        assert_eq!(estimate(&[2.0, 1.0]), Some(Estimate { value: 1.5, low: 1.0, high: 2.0 }));
        let share = coverage(5, 100.0, |random| 100.0 + 5.0 * normal(random));
        assert!((0.91..=0.965).contains(&share), "{share}");
    }

    #[test]
    fn equal_samples_give_an_interval_of_no_width() {
        let same = [Some(4.0); 20];
        let summary = summary(&same).unwrap();
        assert_eq!(summary.median, Estimate { value: 4.0, low: 4.0, high: 4.0 });
        assert!(summary.outliers.is_empty());
        assert_eq!(spread(&finite(&same)), 0.0);
        assert!(is_enough(&same, 0.01));
    }

    #[test]
    fn quantiles_are_those_of_the_definition() {
        let sorted = [1.0, 2.0, 3.0, 4.0];
        assert_eq!([0.0, 0.25, 0.5, 0.75, 1.0].map(|at| quantile(&sorted, at)), [1.0, 1.75, 2.5, 3.25, 4.0]);
        assert_eq!(median(&[9.0, 1.0, 5.0]), 5.0);
        assert_eq!(spread(&sorted), 0.6);
    }

    #[test]
    fn a_ratio_is_that_of_the_distributions() {
        let mut held = 0;
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut draw =
                |middle: f64| -> Vec<_> { (0..20).map(|_| Some(middle + 2.0 * normal(&mut random))).collect() };
            let (base, scaled) = (draw(50.0), draw(75.0));
            let ratio = paired_ratio(&scaled, &base).unwrap();
            held += u32::from(ratio.low <= 1.5 && 1.5 <= ratio.high);
            assert!((1.4..1.6).contains(&ratio.value), "{ratio:?}");
        }
        assert!((88..=100).contains(&held), "{held} of 100");
    }

    #[test]
    fn pairs_take_out_what_slows_a_whole_round_down() {
        let mut random = fastrand::Rng::with_seed(7);
        let drift: Vec<f64> = (0..30).map(|round| 1.0 + f64::from(round) / 30.0).collect();
        let mut draw = |middle: f64| -> Vec<_> {
            drift.iter().map(|by| middle * by * (1.0 + 0.01 * normal(&mut random))).collect()
        };
        let (base, other) = (draw(10.0), draw(12.0));
        let some = |samples: &[f64]| samples.iter().copied().map(Some).collect::<Vec<_>>();
        let paired = paired_ratio(&some(&other), &some(&base)).unwrap();
        let unpaired = unpaired_ratio(&other, &base, CONFIDENCE).unwrap();
        assert!((paired.high - paired.low) * 5.0 < unpaired.high - unpaired.low, "{paired:?} {unpaired:?}");
        assert!(paired.low > 1.17 && paired.high < 1.23, "{paired:?}");
    }

    #[test]
    fn only_rounds_in_which_both_succeeded_are_paired() {
        let base = [Some(1.0), None, Some(2.0), Some(0.0), Some(4.0)];
        let other = [Some(3.0), Some(9.0), Some(6.0), Some(9.0), None];
        assert_eq!(paired_ratio(&other, &base), Some(Estimate { value: 3.0, low: 3.0, high: 3.0 }));
        assert_eq!(paired_ratio(&other[..2], &base[..2]), None);
    }

    #[test]
    fn what_stands_apart_is_an_outlier_of_its_round() {
        let mut samples: Vec<_> = (0..12).map(|round| Some(10.0 + f64::from(round % 3))).collect();
        samples[2] = None;
        samples[5] = Some(40.0);
        samples[9] = Some(-20.0);
        assert_eq!(outliers(&samples), [5, 9]);
    }

    #[test]
    fn precision_is_reached_by_more_runs() {
        let mut random = fastrand::Rng::with_seed(3);
        let samples: Vec<_> = (0..200).map(|_| Some(100.0 + 10.0 * normal(&mut random))).collect();
        assert!(!is_enough(&samples[..3], 0.5), "too few, whatever they say");
        assert!(!is_enough(&samples[..8], 0.03));
        assert!(is_enough(&samples, 0.03));
    }

    #[test]
    fn no_sample_that_is_no_number_comes_through() {
        let mut report = sample::report();
        let odd = [Some(f64::NAN), Some(f64::INFINITY), Some(1.0), Some(2.0), None, Some(f64::NEG_INFINITY)];
        for outcome in report.measures.iter_mut().flat_map(|measure| &mut measure.results) {
            outcome.samples.extend(odd);
        }
        summarise(&mut report);
        for outcome in report.measures.iter().flat_map(|measure| &measure.results) {
            assert!(outcome.samples.iter().flatten().all(|sample| sample.is_finite()));
            let summary = outcome.summary.as_ref().unwrap();
            assert!(summary.greatest.is_finite() && summary.median.low.is_finite() && summary.median.high.is_finite());
        }
    }

    #[test]
    fn the_baseline_is_once_itself() {
        let mut report = sample::report();
        summarise(&mut report);
        let baseline = &report.method.baseline;
        let own = report.measures.iter().flat_map(|measure| &measure.results).filter(|own| &own.contender == baseline);
        for ratio in own.filter_map(|outcome| outcome.ratio) {
            assert_eq!(ratio, Estimate { value: 1.0, low: 1.0, high: 1.0 });
        }
    }
}
