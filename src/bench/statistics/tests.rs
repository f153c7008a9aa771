//! Intervals, ratios and outliers for known distributions.

use super::*;
use crate::bench::example::{self, normal};

/// Returns the fraction of intervals that cover the true median.
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
fn an_interval_covers_the_true_median_at_its_level() {
    let lognormal = |random: &mut fastrand::Rng| (1.0 + 0.8 * normal(random)).exp();
    // A third of the samples come from a second mode at three times the first, which is uniform from 9 to 11, so the
    // median is 10.5.
    let bimodal = |random: &mut fastrand::Rng| {
        if random.f64() < 1.0 / 3.0 { 30.0 + normal(random) } else { 9.0 + 2.0 * random.f64() }
    };
    for size in [6, 9, 14, 30] {
        for (name, share) in [
            ("normal", coverage(size, 100.0, |random| 100.0 + 5.0 * normal(random))),
            ("lognormal", coverage(size, 1_f64.exp(), lognormal)),
            ("bimodal", coverage(size, 10.5, bimodal)),
        ] {
            // With 200 sets, the standard error allows 0.045; intervals of few samples end at samples and cover more.
            assert!((0.905..=0.995).contains(&share), "{name}, {size} samples: {share}");
        }
    }
}

#[test]
fn fewer_samples_keep_more_of_the_draws() {
    // From tables: z(0.975) = 1.960, t(0.975; 6) = 2.447, t(0.975; 19) = 2.093, t(0.995; 9) = 3.250.
    for (confidence, samples, z) in [(0.95, 7, 2.447), (0.95, 20, 2.093), (0.99, 10, 3.250), (0.95, 1_000_000, 1.960)] {
        let expected = normal_tail(z * (as_f64(samples) / (as_f64(samples) - 1.0)).sqrt());
        let tail = tail(confidence, samples);
        assert!((tail / expected - 1.0).abs() < 0.01, "{samples}: {tail} {expected}");
    }
    assert!((normal_tail(1.959_964) - 0.025).abs() < 1e-6);
    assert!((normal_tail(0.0) - 0.5).abs() < 1e-6);
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
    assert!(is_precise_enough(&same, 0.01));
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
        let mut draw = |middle: f64| -> Vec<_> { (0..20).map(|_| Some(middle + 2.0 * normal(&mut random))).collect() };
        let (base, scaled) = (draw(50.0), draw(75.0));
        let ratio = paired_ratio(&scaled, &base).unwrap();
        held += u32::from(ratio.low <= 1.5 && 1.5 <= ratio.high);
        assert!((1.4..1.6).contains(&ratio.value), "{ratio:?}");
    }
    assert!((88..=100).contains(&held), "{held} of 100");
}

#[test]
fn pairing_removes_the_noise_of_whole_rounds() {
    let mut random = fastrand::Rng::with_seed(7);
    let drift: Vec<f64> = (0..30).map(|round| 1.0 + f64::from(round) / 30.0).collect();
    let mut draw =
        |middle: f64| -> Vec<_> { drift.iter().map(|by| middle * by * (1.0 + 0.01 * normal(&mut random))).collect() };
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
fn outliers_are_relative_to_their_round() {
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
    assert!(!is_precise_enough(&samples[..3], 0.5), "too few, whatever they say");
    assert!(!is_precise_enough(&samples[..8], 0.03));
    assert!(is_precise_enough(&samples, 0.03));
}

#[test]
fn non_finite_samples_are_rejected() {
    let mut report = example::report();
    let odd = [Some(f64::NAN), Some(f64::INFINITY), Some(1.0), Some(2.0), None, Some(f64::NEG_INFINITY)];
    for outcome in report.metrics.iter_mut().flat_map(|metric| &mut metric.results) {
        outcome.samples.extend(odd);
    }
    summarize(&mut report);
    for outcome in report.metrics.iter().flat_map(|metric| &metric.results) {
        assert!(outcome.samples.iter().flatten().all(|sample| sample.is_finite()));
        let summary = outcome.summary.as_ref().unwrap();
        assert!(summary.max.is_finite() && summary.median.low.is_finite() && summary.median.high.is_finite());
    }
}

#[test]
fn the_ratio_of_the_baseline_is_one() {
    let mut report = example::report();
    summarize(&mut report);
    let baseline = &report.method.baseline;
    let own = report.metrics.iter().flat_map(|metric| &metric.results).filter(|own| &own.contender == baseline);
    for ratio in own.filter_map(|outcome| outcome.ratio) {
        assert_eq!(ratio, Estimate { value: 1.0, low: 1.0, high: 1.0 });
    }
}
