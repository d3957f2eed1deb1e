"""Videos from weights: calls, streams, pipelines, the teacher."""
