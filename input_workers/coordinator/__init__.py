"""What a trainer calls; the only place that knows all parts."""
