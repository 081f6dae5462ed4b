"""Names and layouts of classifiers, DiT and Inception in other libraries' files."""
