"""Which combinations of settings are possible: one list of rules, and what apply refuses."""
