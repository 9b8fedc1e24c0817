"""What a teacher gives: queries, matches, targets and features. Knows records, models and supervision, no loop."""
