"""From audio to discrete units: reading, features, per-speaker normalisation, k-means, alignments."""
