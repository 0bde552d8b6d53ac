"""What csdraft is measured with: not part of the wheel. `python -m benchmarks --help` lists the commands."""
