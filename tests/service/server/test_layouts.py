"""Which layouts come into question, and which one is chosen from given measurements."""

from __future__ import annotations

import pytest

from service.server.layouts import Layout, Measured, MiB, Rate, candidates, choose, most_processes, starved

PLENTY = 2**40


def layout(text):
    processes, threads = map(int, text.split("×"))
    return Layout(processes=processes, threads=threads)


def measured(text, *rates, size=100 * MiB, cpu=1.0):
    each = {f"w{i}": Rate(images_per_second=rate, latency=0.001, cpu=cpu) for i, rate in enumerate(rates)}
    return Measured(layout=layout(text), rates=each, process_bytes=size)


@pytest.mark.parametrize(
    ("cpus", "most", "expected"),
    [
        (1, 256, "1×1"),
        (2, 256, "1×2 2×1"),
        (3, 256, "1×3 3×1"),
        (6, 256, "1×6 3×2 6×1"),
        (8, 256, "1×8 2×4 4×2 8×1"),
        (8, 3, "1×8 2×4 3×2"),
        (8, 1, "1×8"),
        (600, 256, "1×600 2×300 4×150 9×66 18×33 37×16 75×8 150×4 256×2"),
    ],
)
def test_layouts_share_out_the_cpus(cpus, most, expected):
    assert candidates(cpus, most) == [layout(each) for each in expected.split()]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"1×2": (10, 10), "2×1": (20, 20)}, "2×1"),
        ({"1×2": (20, 20), "2×1": (10, 10)}, "1×2"),
        ({"1×2": (100, 1), "2×1": (10, 2)}, "1×2"),  # 0.71 and 0.32: ratios count, not sums of images
        ({"1×2": (1000, 1), "2×1": (900, 4)}, "2×1"),
        ({"1×2": (100, 100), "2×1": (96, 96)}, "2×1"),  # as good, and more processes
        ({"1×2": (100, 100), "2×1": (94, 94)}, "1×2"),
    ],
)
def test_what_computes_most_over_all_workloads_is_chosen(rates, expected):
    choice = choose([measured(text, *values) for text, values in rates.items()], 2, PLENTY)
    assert choice.layout == layout(expected)
    assert max(choice.shares.values()) <= 1
    assert f"{choice.shares[choice.layout]:.2f} of the best" in choice.why


def test_a_wider_tie_prefers_more_processes():
    found = [measured("1×2", 100), measured("2×1", 70)]
    assert choose(found, 2, PLENTY).layout == layout("1×2")
    assert choose(found, 2, PLENTY, tie=0.4).layout == layout("2×1")


def test_what_does_not_fit_into_memory_is_not_chosen_and_the_reason_says_so():
    found = [measured("1×4", 10), measured("2×2", 20), measured("4×1", 40)]
    choice = choose(found, 4, 300 * MiB)
    assert choice.layout == layout("2×2")
    assert "300 MiB of memory hold no more than 2" in choice.why
    assert choose(found, 4, 600 * MiB).layout == layout("4×1")
    assert choose(found[1:], 4, MiB).layout == layout("2×2")  # nothing fits: the least


def test_three_quarters_of_the_memory_are_for_processes():
    assert most_processes(100 * MiB, 400 * MiB) == 3
    assert most_processes(100 * MiB, MiB) == 1
    assert most_processes(1, PLENTY) == 256


def test_a_measurement_that_others_have_starved_is_known():
    alone = [measured("1×2", 10, cpu=0.2), measured("2×1", 20, cpu=0.9)]
    assert starved(alone) is None
    assert starved([alone[0], measured("2×1", 20, cpu=0.5)]) == 0.5
