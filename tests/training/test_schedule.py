import pytest

from src.training.schedule import learning_rate


def test_the_rate_starts_warm_peaks_and_ends_at_its_final_value():
    rates = [learning_rate(step, 100, 10, 1e-3, 1e-4) for step in range(100)]
    assert rates[0] > 0
    assert all(later > earlier for earlier, later in zip(rates[:10], rates[1:11], strict=True))
    assert all(later < earlier for earlier, later in zip(rates[10:-1], rates[11:], strict=True))
    assert abs(rates[-1] - 1e-4) < 1e-12


def test_without_warm_up_the_first_step_has_the_initial_rate():
    assert learning_rate(0, 50, 0, 5e-6, 1e-6) == 5e-6


@pytest.mark.parametrize("total", [2, 3, 10])
def test_the_last_step_of_a_run_of_any_length_has_the_final_rate_and_it_stays(total):
    rates = [learning_rate(step, total, 0, 1e-3, 1e-4) for step in range(2 * total)]
    assert rates[0] == 1e-3 and rates[total - 2] > 1.2e-4 and rates[total - 1:] == pytest.approx([1e-4] * (total + 1), rel=1e-12)


def test_half_way_the_cosine_is_half_way():
    assert abs(learning_rate(50, 101, 0, 1.0, 0.0) - 0.5) < 1e-12


def test_a_run_of_one_step_and_rates_of_zero_have_no_division_by_zero():
    assert learning_rate(0, 1, 0, 1e-3, 1e-4) == 1e-3
    assert learning_rate(3, 10, 0, 0.0, 0.0) == 0.0
