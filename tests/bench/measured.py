"""Results with chosen numbers."""

from __future__ import annotations

from parl_core.bench.results import Contest, Entry, Results

ENVIRONMENT = {
    "cpu": "a processor",
    "cores": 2,
    "threads": 2,
    "python": "3.11.7",
    "torch": "2.13.0",
    "numba": None,
    "jax": "0.10.2",
    "date": "2026-11-21",
    "commit": "0123456789abcdef",
    "dirty": False,
}


def timed(name, median, spread=0.1, **fields):
    """A contestant whose quartiles are `spread` times the median away from it."""
    fields.setdefault("ours", False)
    return Entry(
        name=name,
        median=median,
        lower_quartile=median * (1 - spread),
        upper_quartile=median * (1 + spread),
        rounds=9,
        error=1e-7,
        **fields,
    )


def results(*contests, **facts):
    return Results({**ENVIRONMENT, **facts}, contests)


def hvp(ours=1e-3, peer=2e-3, size="h64", **fields):
    """A contest of four, of whom two have times."""
    return Contest(
        topic="linearization",
        name=f"hvp {size}",
        entries=(
            timed(
                "parl-core", ours, ours=True, speedup=peer / ours, to_floor=ours / 5e-4, gradients=1.5, peak_mib=0.25
            ),
            timed("JAX", peer, limited="compiled for one θ"),
            Entry(name="betty", ours=False, withheld="not installed: No module named 'betty'"),
            Entry(name="hypergrad", ours=False, withheld="wrong: its error is 7.2e-01, 1e-04 is allowed"),
        ),
        floor=5e-4,
        floor_of="1e+07 flops",
        gradient=7e-4,
        **fields,
    )
