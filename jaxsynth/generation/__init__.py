"""Generation: schedule, sampler, guidance, conditioner, decoder, and the images that come out."""
