_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["dcn_plugin"])

model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(
            type="DeformRoIExtractor",
            roi_layer=dict(_delete_=True, type="DeformRoIAlignPack", output_size=7, output_channels=256),
        )
    )
)
