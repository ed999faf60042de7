"""Plans compiled into action lists: schedules, ownership, compilation, proof, and the checker."""
