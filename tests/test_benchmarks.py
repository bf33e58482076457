"""What the benchmarks measure with: counted and repeated matrix products, medians in turn, memory of a child."""

import torch

from benchmarks.measure import Products, interleaved, peak_memory


def test_products_are_counted_and_called_again():
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, 4)
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    batch = torch.randn(6, 5, 3), torch.randn(6, 3, 7)
    with Products(keep=True) as products:
        (x @ weight + x @ a.T @ b.T).sum().backward()
        torch.bmm(*batch)
    # forward: x W, x A, (x A) B; backward: the gradients of x (two), of A and of B, and that of x A
    base, low_in, low_out = 2 * 5 * 3 * 4, 2 * 5 * 3 * 2, 2 * 5 * 2 * 4
    assert products.flops == 2 * base + 3 * low_in + 3 * low_out + 2 * 6 * 5 * 3 * 7
    assert products.count == len(products.calls) == 9
    with Products() as again:
        products.replay()
    assert (again.count, again.flops, again.calls) == (products.count, products.flops, [])


def test_forms_run_in_turn():
    calls = []
    seconds, results = interleaved({name: lambda name=name: calls.append(name) or name for name in "ab"}, rounds=3)
    assert calls == list("ababab") and results == {"a": "a", "b": "b"} and seconds.keys() == {"a", "b"}


def hold(megabytes: int):
    kept = torch.ones(50_000_000 // 4)  # is there before, so it does not count
    return lambda: (kept.sum(), torch.ones(megabytes * 1_000_000 // 4).sum())


def test_peak_memory_is_what_a_call_takes():
    assert 90e6 < peak_memory(hold, 100) < 130e6
