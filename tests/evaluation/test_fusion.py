import numpy as np
import pytest

from volseg.evaluation.fusion import Fusion, cross_fused, fit_fusion

NAMES = ("volume_ml", "sphericity", "intensity_mean")


def lesions(n=160, *, seed=0, missing=0.0):
    """Outputs, measurements of very different scales, and classes that depend on both."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(n, 2)) * 2
    measurements = rng.normal(size=(n, 3)) * (800, 0.1, 90) + (1000, 0.7, -300)
    z = (measurements - (1000, 0.7, -300)) / (800, 0.1, 90)
    logit = 0.8 * (outputs[:, 1] - outputs[:, 0]) + 1.5 * z[:, 0] - z[:, 2] - 0.5
    positive = rng.random(n) < 1 / (1 + np.exp(-logit))
    measurements[rng.random(measurements.shape) < missing] = np.nan
    return outputs, measurements, positive


def probability(fused):
    return 1 / (1 + np.exp(fused[:, 0] - fused[:, 1]))


@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_it_is_the_logistic_regression_of_scikit_learn(l2, missing):
    sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert sklearn
    outputs, measurements, positive = lesions(missing=missing)
    new_outputs, new_measurements, _ = lesions(50, seed=1, missing=missing)
    fusion = fit_fusion(outputs, measurements, positive, NAMES, l2=l2)

    def inputs(out, measured):
        return np.column_stack([out[:, 1] - out[:, 0], measured])

    scaler = StandardScaler()  # before the imputer: it too leaves out what is unknown
    model = LogisticRegression(C=1 / l2, tol=1e-12, max_iter=100_000, solver="newton-cholesky")
    witness = make_pipeline(scaler, SimpleImputer(), model)
    witness.fit(inputs(outputs, measurements), positive)
    expected = witness.predict_proba(inputs(new_outputs, new_measurements))[:, 1]
    if missing:  # its deviations are of the known values, as ours
        np.testing.assert_allclose(fusion.deviations, np.sqrt(scaler.var_), rtol=1e-12)
        with np.errstate(all="ignore"):
            filled = np.where(np.isnan(new_measurements), scaler.mean_[1:], new_measurements)
        expected = witness.predict_proba(inputs(new_outputs, filled))[:, 1]
    probabilities = probability(fusion(new_outputs, new_measurements))
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_scale_and_unit_of_a_measurement_change_nothing():
    outputs, measurements, positive = lesions()
    plain = fit_fusion(outputs, measurements, positive, NAMES, l2=1.0)
    other = measurements * (1e-3, 5, -2) + (7, 0, 1)
    scaled = fit_fusion(outputs, other, positive, NAMES, l2=1.0)
    np.testing.assert_allclose(scaled(outputs, other), plain(outputs, measurements), atol=1e-7)


def test_a_constant_measurement_has_no_weight():
    outputs, measurements, positive = lesions()
    measurements[:, 1] = 0.7
    fusion = fit_fusion(outputs, measurements, positive, NAMES, l2=1.0)
    assert abs(fusion.weights[2]) < 1e-9
    changed = measurements + (0, 5, 0)
    np.testing.assert_allclose(fusion(outputs, changed), fusion(outputs, measurements), atol=1e-6)


def test_separable_classes_have_finite_weights():
    outputs, measurements, _ = lesions()
    positive = measurements[:, 0] > 1000
    fusion = fit_fusion(outputs, measurements, positive, NAMES, l2=1e-6)
    assert np.isfinite(fusion.weights).all()
    assert ((probability(fusion(outputs, measurements)) > 0.5) == positive).all()


def test_arrays_give_the_same_fusion_and_damaged_ones_are_refused():
    outputs, measurements, positive = lesions()
    fusion = fit_fusion(outputs, measurements, positive, NAMES, l2=1.0)
    again = Fusion.of_arrays(NAMES, fusion.arrays())
    np.testing.assert_array_equal(again(outputs, measurements), fusion(outputs, measurements))
    for name, wrong in (("weights", np.zeros(3)), ("means", np.full(4, np.nan))):
        with pytest.raises(ValueError, match=f"the {name} of the fusion"):
            Fusion.of_arrays(NAMES, fusion.arrays() | {f"fusion.{name}": wrong})
    with pytest.raises(ValueError, match="deviations of the fusion must be above 0"):
        Fusion.of_arrays(NAMES, fusion.arrays() | {"fusion.deviations": np.zeros(4)})
    with pytest.raises(ValueError, match="lacks means"):
        Fusion.of_arrays(NAMES, {})


def test_a_lesion_is_judged_by_a_fusion_that_has_not_seen_its_fold():
    outputs, measurements, positive = lesions(90)
    folds = np.arange(90) % 3
    fused = cross_fused(outputs, measurements, positive, folds, l2=1.0)
    flipped = positive.copy()
    flipped[folds == 1] = ~flipped[folds == 1]
    again = cross_fused(outputs, measurements, flipped, folds, l2=1.0)
    np.testing.assert_array_equal(again[folds == 1], fused[folds == 1])
    assert np.abs(again[folds == 0] - fused[folds == 0]).min() > 0


def test_too_few_lesions_of_a_class_are_refused():
    outputs, measurements, _ = lesions(20)
    with pytest.raises(ValueError, match=r"needs 5 lesions of each class, got \[16, 4\]"):
        fit_fusion(outputs, measurements, np.arange(20) < 4, NAMES, l2=1.0)
