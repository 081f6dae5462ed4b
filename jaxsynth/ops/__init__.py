"""Operations that depend on the backend: attention, convolution, resizing, random bits."""
