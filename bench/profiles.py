"""How much of everything ``python -m bench run`` asks for."""

from bench.observation import Scale

PROFILES: dict[str, Scale] = {
    scale.name: scale
    for scale in (
        # Sees that everything works, in seconds; its figures mean nothing.
        Scale(
            name="smoke", rounds=1, connections=1000, services=(1, 100), workers=(1,), seconds=0.5
        ),
        # While one changes something: some 3 minutes. 4 rounds are the least that two results can be
        # compared by (bench/intervals.py).
        Scale(
            name="short",
            rounds=4,
            connections=5000,
            services=(1, 1000),
            workers=(1, 2),
            seconds=0.5,
        ),
        # What is published, with the 5,000 Services of the design's bars: below 30 minutes on two CPUs.
        # 9 rounds are the least whose interval is narrower than from the least to the greatest value.
        Scale(
            name="full",
            rounds=9,
            connections=30_000,
            services=(1, 1000, 5000, 10_000),
            workers=(1, 2),
            seconds=1.0,
            turns=4,
        ),
    )
}
