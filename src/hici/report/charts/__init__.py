"""Charts: functions from series to a matplotlib figure, as wide as a page or (narrow) as a phone."""
