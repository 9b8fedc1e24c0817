"""Pictures in, answers out. Knows no loss, no teacher, no data set."""
