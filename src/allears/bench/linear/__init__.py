"""The benchmark of linear attention: time, memory and bandwidth over length, and how they grow."""
