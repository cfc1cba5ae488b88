"""The simplifier's engine: graphs, patterns, rules, demand, verification. Knows TensorFlow graphs, not Keras."""
