"""What crosses rooms: workload, search space, schedules, and the plan with its invariants."""
