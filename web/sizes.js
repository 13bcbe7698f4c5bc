// Sizes (width, height) that the variants were trained on; checked against kandinsky5_core/config.py by the tests.
export const SIZE_GROUPS = [
  { name: "512", sizes: [[768, 512], [512, 768], [512, 512]] },
  {
    name: "1024",
    sizes: [[1024, 1024], [1280, 768], [768, 1280], [1152, 896], [896, 1152], [1408, 640], [640, 1408]],
  },
  { name: "Nano", sizes: [[64, 64], [96, 64], [64, 96], [96, 96]] },
];
