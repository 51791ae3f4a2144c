import attngen as ag


class SlidingTile(ag.Variant):
    """Video in tiles: a tile attends to those within a window of tiles around it, in time, height and width; at the border the window
    stays inside. All tokens of a tile attend alike, so that a kernel's tiles are empty or full.

    With tile = position // tile_size, numbered by t, then y, then x: |clamp(t_q, w // 2, n - 1 - w // 2) - t_kv| <= w // 2, and y, x alike.

    Source: Zhang et al. 2025, "Fast Video Generation with Sliding Tile Attention"; FastVideo's ``generate_sta_mask``.

    tile_size: tokens of a tile (6 x 8 x 8 in HunyuanVideo), which lie one after another. tiles_y, tiles_x, tiles_t: how many tiles;
    window_t, window_y, window_x: of the window, odd.
    """

    tiles_t: ag.Scalar[int]
    tiles_y: ag.Scalar[int]
    tiles_x: ag.Scalar[int]
    tile_size: ag.Scalar[int] = 384
    window_t: ag.Scalar[int] = 3
    window_y: ag.Scalar[int] = 3
    window_x: ag.Scalar[int] = 3

    def mask(self, at):
        q, kv, plane = at.q // self.tile_size, at.kv // self.tile_size, self.tiles_y * self.tiles_x
        axes = (
            (q // plane, kv // plane, self.tiles_t, self.window_t),
            (q % plane // self.tiles_x, kv % plane // self.tiles_x, self.tiles_y, self.window_y),
            (q % self.tiles_x, kv % self.tiles_x, self.tiles_x, self.window_x),
        )
        near = [abs(ag.min(ag.max(a, w // 2), n - 1 - w // 2) - b) <= w // 2 for a, b, n, w in axes]
        return near[0] & near[1] & near[2]
