"""A protein-pair aligner with optimal-transport attention, trained on real Pfam seed alignments."""
