"""What tests and benchmarks of the operations share: sample calls, error budgets, the formulas as printed."""
