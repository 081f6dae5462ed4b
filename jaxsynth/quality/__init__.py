"""Quality of generated images: features, FID, KID, precision and recall, adherence."""
