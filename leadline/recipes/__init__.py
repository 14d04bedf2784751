"""Complete runs: functions that return everything a run needs, and the verbs that start them."""
