from .rfcn_head import RFCNBBoxHead, RFCNRoIHead

__all__ = ["RFCNBBoxHead", "RFCNRoIHead"]
